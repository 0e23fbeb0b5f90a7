"""planning/forecast.py: what DeepSpeed keeps and sends, by real engines on two ranks; a cluster's sums."""

import json
import sys

import pytest
from forked import start

from mapet_ds.config.engine import load_deepspeed_config
from mapet_ds.config.recipe import load_config
from mapet_ds.config.sections import REPOSITORY
from mapet_ds.errors import ConfigError
from mapet_ds.planning.counting import student
from mapet_ds.planning.forecast import Cluster, Request, Speeds, engine_costs, predict, scaling
from mapet_ds.planning.roofline import GPUS

ENGINES = ("zero1", "zero2", "zero3", "zero2_cpu")
BUCKET = 1_000_000
"""Larger than any parameter, as in the shipped files, so that none has a bucket of its own."""
WORKER = """
import gc, json, sys, warnings
from collections import Counter
warnings.filterwarnings("ignore")
import torch, torch.distributed as dist
from mapet_ds.config.engine import load_deepspeed_config
from mapet_ds.training.engine import build_engine
from mapet_ds.training.optim import parameter_groups
from mapet_ds.launch import init_distributed
from mapet_ds.methods import build_objective
from mapet_ds.config.recipe import load_config

def storages(*tensors):
    return {s._cdata: s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors)}

def tensors():
    gc.collect()
    return [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter) and not o.is_meta]

def live(model):
    return storages(*tensors(), *(p.grad for p in model.parameters() if p.grad is not None))

def listen(name):
    collective = getattr(dist, name)
    def heard(*args, **kwargs):
        tensor = next(t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor))
        sent[name] += tensor.numel() * tensor.element_size()
        return collective(*args, **kwargs)
    setattr(dist, name, heard)

sent, facts = Counter(), {}
for name in ("all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor"):
    listen(name)
ranks = init_distributed()
config = load_config(sys.argv[1])
for path in sys.argv[2:]:
    objective = build_objective(config, config.tokenizer.vocab_size)
    there = tensors()  # held, so that nothing new has their addresses
    others = set(storages(*there)) - set(storages(*objective.parameters()))
    engine_config = load_deepspeed_config(path)
    engine_config["zero_optimization"]["reduce_bucket_size"] = BUCKET
    groups = parameter_groups(objective, 0.05)
    engine = build_engine(objective, groups, config, engine_config, ranks.world_size, torch.device("cpu"))
    dtype, _ = engine.get_data_types()
    ids, noted = torch.zeros(2, config.num_patches, dtype=torch.long), []
    for micro_step in range(4):
        before = Counter(sent)
        loss = engine(torch.ones(2, 3, 64, 64, dtype=dtype), ids, engine.module.draw(0, 0, 2)).loss
        engine.backward(loss)
        sizes = [size for key, size in live(objective).items() if key not in others]
        kept = sum(sizes) if micro_step == 2 else None
        middle = Counter(sent)
        engine.step()
        noted.append([kept, dict(middle - before), dict(sent - middle)])
    facts[path] = noted
    engine.destroy()
    del engine, objective, loss
if ranks.rank == 0:
    print("FACTS", json.dumps(facts))
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    recipe = {
        "model": {
            "name": "vit_tiny_patch16_224",
            "img_size": 64,
            "args": {"depth": 2, "embed_dim": 384, "num_heads": 6},
        },
        "teacher": {"img_size": 128},
        "tokenizer": {"vocab_size": 64},
        "train": {"global_batch_size": 8, "micro_batch_size": 2},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    (folder / "worker.py").write_text(WORKER.replace("BUCKET", str(BUCKET)))
    files = [REPOSITORY / f"ds_configs/{name}.json" for name in ENGINES]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = start(*launcher, folder / "worker.py", folder / "recipe.yaml", *files)
    assert done.returncode == 0, done.stderr
    parameters = student(load_config(folder / "recipe.yaml")).parameters
    facts = json.loads(
        next(line for line in done.stdout.splitlines() if line.startswith("FACTS")).removeprefix("FACTS")
    )
    return parameters, {name: facts[str(path)] for name, path in zip(ENGINES, files)}


def costs(name, parameters, ranks=2):
    config = load_deepspeed_config(REPOSITORY / f"ds_configs/{name}.json")
    config["zero_optimization"]["reduce_bucket_size"] = BUCKET
    return engine_costs(config, parameters, ranks, accumulate=True)


@pytest.mark.parametrize("name", ENGINES)
def test_what_a_rank_keeps(measured, name):
    """After the backward pass of a middle micro-step, when stage 3 has let go of what it gathered."""
    parameters, facts = measured
    engine, size = costs(name, parameters), 4 if name.endswith("_cpu") else 2
    kept = engine.weights + engine.optimizer + engine.gradients
    if "zero3" in name:
        kept += engine.buffers - size * parameters
    assert facts[name][2][0] == pytest.approx(kept, rel=0.1)


@pytest.mark.parametrize("name", ENGINES)
def test_what_a_rank_sends(measured, name):
    """Bytes of sums and gathers in a micro-step in the middle, and in the update after the next."""
    parameters, facts = measured
    engine, (_, inner, _), (_, last, update) = costs(name, parameters), facts[name][2], facts[name][3]
    summed = "reduce_scatter_tensor" if engine.scattered else "all_reduce"
    whole = (
        engine.reduced / 2 if engine.scattered else engine.reduced
    )  # of a scatter, each rank's part is seen
    assert inner.get(summed, 0) == pytest.approx(
        whole if engine.reduced_each_micro_step else 0, rel=0.1, abs=1000
    )
    assert last.get(summed, 0) == pytest.approx(whole, rel=0.1)
    gathered = inner.get("all_gather_into_tensor", 0)
    assert gathered == pytest.approx(engine.gathered_per_micro_step, rel=0.1, abs=1000)
    if engine.gathered_per_step:
        assert update["all_gather_into_tensor"] == pytest.approx(engine.gathered_per_step, rel=0.1)


def request(
    recipe="mapet_vitb16",
    gpu="h100",
    engine="zero2",
    nodes=1,
    fixed=False,
    overrides=(),
    link=400.0,
    storage=2.0,
):
    config = load_config(REPOSITORY / f"mapet_ds/recipes/{recipe}.yaml", list(overrides))
    cluster = Cluster(GPUS[gpu], nodes, 8, link, storage, 110)
    json_ = load_deepspeed_config(REPOSITORY / f"ds_configs/{engine}.json")
    return Request(config, json_, cluster, 1_281_167, Speeds(0.3, 0.3), fixed)


def test_a_step_is_the_sum_of_its_parts_and_a_run_of_its_steps():
    found = predict(request(nodes=4))
    seconds, held = dict(found["step_seconds"]), dict(found["memory_gib"])
    assert seconds.pop("total") == pytest.approx(sum(seconds.values()))
    assert held.pop("total") == pytest.approx(sum(held.values()))
    assert found["images_per_second"] == pytest.approx(2048 / found["step_seconds"]["total"])
    assert found["hours"] == pytest.approx(300 * 1_281_167 / found["images_per_second"] / 3600, rel=0.001)
    assert found["gpu_hours"] == pytest.approx(32 * found["hours"])
    assert found["micro_batch_size"] * found["grad_accum_steps"] * 32 == 2048
    compute = 64 * (246.2e9 + 507.0e9) / (0.3 * 989e12)
    assert seconds["student"] + seconds["teacher"] == pytest.approx(compute, rel=0.001)


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "mapet_ds/recipes").glob("[!f]*_vit*16.yaml")), ids=lambda path: path.stem
)
def test_every_shipped_recipe_fits_a_node_of_the_smallest_gpus(path):
    found, asked = predict(request(path.stem, "a100-40")), load_config(path).train.micro_batch_size
    assert found["micro_batch_size"] == asked <= found["largest_micro_batch_size"]
    assert found["memory_gib"]["total"] < 39.4


def test_each_thing_can_bind():
    assert predict(request())["binds"] == "teacher"
    assert predict(request("saim_vitb16"))["binds"] == "student"
    assert predict(request(storage=0.01))["binds"] == "input"
    assert predict(request(link=1.0, nodes=4))["binds"] == "link"
    assert predict(request("saim_vitb16", nodes=128))["binds"] in ("launch", "link")


def test_zero_stages_spread_what_they_say():
    one, two, three = (predict(request(engine=f"zero{stage}", nodes=2))["memory_gib"] for stage in (1, 2, 3))
    assert one["gradients"] > 15 * two["gradients"]
    assert one["optimizer"] == two["optimizer"] == three["optimizer"]
    sharded = predict(request(nodes=2, overrides=["teacher.shard=world"]))["memory_gib"]["teacher"]
    assert (
        sharded
        < two["teacher"]
        < predict(request(nodes=2, overrides=["teacher.shard=none"]))["memory_gib"]["teacher"]
    )
    ahead = predict(request(nodes=2, overrides=["teacher.ahead=true"]))["memory_gib"]
    assert ahead["activations"] > two["activations"] and ahead["teacher"] == two["teacher"]


def test_scaling_is_never_better_than_linear_and_names_what_can_not_run():
    curve = scaling(request())
    assert [row["gpus"] for row in curve] == [2**i for i in range(11)]
    shares = [row["efficiency"] for row in curve]
    assert shares == sorted(shares, reverse=True) and 0 < shares[-1] < shares[0] == 1
    six = request(overrides=["train.global_batch_size=3072"])
    counts = [row["gpus"] for row in scaling(six._replace(cluster=six.cluster._replace(gpus_per_node=6)))]
    assert counts == [1, 2, 4, 6, 12, 24, 48, 96, 192, 384, 768]
    refused = [row for row in scaling(request("conmim_vitl16")) if "refused" in row]
    assert [row["gpus"] for row in refused] == [64, 128, 256, 512, 1024]
    assert "at most 32 GPUs" in refused[0]["refused"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"overrides": ["train.global_batch_size=2044"]}, "take train.global_batch_size=2048"),
        ({"overrides": ["train.micro_batch_size=96"], "fixed": True}, "take one of 256, 128"),
        (
            {"overrides": ["train.micro_batch_size=256"], "fixed": True, "gpu": "a100-40"},
            "try train.micro_batch_size=128 or train.grad_checkpointing=true",
        ),
    ],
)
def test_what_can_not_run_is_refused_with_a_cure(options, says):
    with pytest.raises(ConfigError, match=says):
        predict(request(**options))
