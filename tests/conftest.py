"""The longest files first, so that no worker ends long before the other: pytest-xdist hands out whole files in this order."""

LONGEST = ["test_methods.py", "test_pretrain.py", "test_faults.py", "test_tutorial.py", "test_finetune.py", "test_benchmark.py"]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
