"""Settings: every recipe loads, and each mistake is answered with a sentence, at once."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mapet_ds.config.engine import load_deepspeed_config
from mapet_ds.config.finetune import FinetuneConfig
from mapet_ds.config.knobs import known_keys
from mapet_ds.config.recipe import RecipeLoader, load_config
from mapet_ds.config.rules import check, check_inputs
from mapet_ds.config.running import flatten, total_steps
from mapet_ds.config.sections import REPOSITORY, Config
from mapet_ds.config.segment import SegmentationConfig
from mapet_ds.config.towers import teacher_grid
from mapet_ds.errors import ConfigError
from mapet_ds.training.command_line import check_files

SETTINGS = {"finetune": FinetuneConfig, "segment": SegmentationConfig}
"""Of recipes by the first word of their names; all others are of pre-training."""
RECIPES = [
    p
    for p in sorted((REPOSITORY / "mapet_ds/recipes").glob("*.yaml"))
    if p.stem.split("_")[0] not in SETTINGS
]


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    (tmp_path / "images").mkdir()
    path.write_text(f"data: {{train: {tmp_path}/images}}\nrun_dir: {tmp_path}/run\n")
    return path


RECIPES_BY_NAME = {path.stem: path for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_is_complete(path, tmp_path):
    (tmp_path / "images").mkdir()
    folders = [f"data.train={tmp_path}/images", f"run_dir={tmp_path}/run"]
    config = load_config(path, folders)
    if config.teacher.name.startswith("local-dir:"):
        grid = {"model_cfg": {"vision_cfg": {"patch_size": config.teacher.img_size // config.grid}}}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(grid))
        config = load_config(path, [*folders, f"teacher.name=local-dir:{tmp_path}"])
    check(config, world_size=2)
    head = path.read_text().split("objective:")[0]
    assert "pretrain.py --config mapet_ds/recipes/" + path.name in head.replace("\\\n", ""), (
        "its command stands at its head"
    )


def test_published_settings():
    config = load_config(REPOSITORY / "mapet_ds/recipes/mapet_vitb16.yaml")
    assert (config.optim.lr, config.optim.weight_decay, config.optim.clip_grad) == (1.5e-3, 0.05, 3.0)
    assert (config.train.epochs, config.train.global_batch_size, config.optim.warmup_epochs) == (
        300,
        2048,
        10,
    )
    assert (config.tokenizer.vocab_size, config.tokenizer.points_per_centroid, config.tokenizer.redo) == (
        8192,
        512,
        5,
    )
    assert config.num_patches == 196
    assert teacher_grid(config.teacher) == 14
    assert total_steps(config, 1_281_167) == 187_671


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["objective=simmim"], "there are: mapet, beit, mvp, saim, conmim, mae, cae"),
        (["objective=beit", "beit.hidden_share=0"], r"beit\.hidden_share = 0\.0 hides 0 of 196"),
        (["objective=beit", "beit.hidden_share=1"], "at least one must be hidden and one visible"),
        (["objective=mvp", "mvp.loss=mse"], r"mvp\.loss"),
        (["objective=conmim", "conmim.cell=4"], r"conmim\.cell = 4 does not divide the student's grid of 14"),
        (
            ["objective=conmim", "train.micro_batch_size=32"],
            r"bn_group = 64 does not divide.*conmim\.bn_group=32",
        ),
        (["objective=mae", "mae.decoder_heads=3"], r"mae\.decoder_width = 512 must be a multiple of .* = 3,"),
        (["data.strong.blur_sigma=[2, 1]"], "blur_sigma = .* must be positive and rising"),
        (["data.strong.jitter=[0.4, 0.4, 0.2, 0.6]"], "hue at most 0.5"),
        (["objective=mvp", "teacher.img_size=224"], "teacher's grid is 7"),
        (
            ["objective=mvp", "teacher.name=timm:vit_base_patch14_dinov2", "teacher.img_size=224"],
            "teacher's grid is 16 x 16 .* Set teacher.img_size=196,",
        ),
        (
            ["objective=mvp", "teacher.name=timm:vit_base_patch14_dinov2", "teacher.img_size=200"],
            "not a multiple of timm:vit_base_patch14_dinov2's patch of 14 pixels: set teacher.img_size=196,",
        ),
        (
            [
                "objective=mvp",
                "teacher.name=timm:vit_small_patch14_dinov2",
                "teacher.img_size=196",
                "teacher.features=projected",
            ],
            "timm:vit_small_patch14_dinov2 is a tower of timm's: no projection",
        ),
        (["objective=mvp", "teacher.features=projected"], "RN50x64 is a ResNet: no final norm"),
        (["tokenizer.name=vqgan"], "there are kclip, vqkd, dalle and package.module:factory"),
    ],
)
def test_each_objective_knows_its_contradictions(overrides, says, tmp_path):
    with pytest.raises(ConfigError, match=says):
        check(
            load_config(
                RECIPES_BY_NAME["mapet_vitb16"], [f"data.train={tmp_path}", f"run_dir={tmp_path}", *overrides]
            ),
            1,
        )


def test_objectives_without_a_teacher_do_not_mind_its_grid(tmp_path):
    given = [f"data.train={tmp_path}", f"run_dir={tmp_path}-run", "teacher.img_size=224"]
    for objective in ("saim", "conmim", "mae"):
        check(load_config(RECIPES_BY_NAME["mapet_vitb16"], [*given, f"objective={objective}"]), 1)
    check(load_config(RECIPES_BY_NAME["mapet_vitb16"], [*given, "tokenizer.name=vqkd"]), 1)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.trian=/x", r"data\.trian.*command line.*did you mean data\.train"),
        ("optim.lr=fast", r'optim\.lr = "fast".*number'),
        ("optim.lr=-1", "optim.lr = -1"),
        ("optim.lr=.nan", "optim.lr = NaN"),
        ("train.micro_batch_size=true", "train.micro_batch_size = true"),
        ("train.micro_batch_size=1.5", "train.micro_batch_size = 1.5"),
        ("train.global_batch_size=100", "100 is not a multiple of train.micro_batch_size 128 x 2 ranks"),
        ("train.world_size=64", "launcher started 2 ranks"),
        ("teacher.img_size=224", "7 x 7 .* 14 x 14: each patch needs one target. Set teacher.img_size=448"),
        ("teacher.name=RN50x65", "RN50x64"),
        ("teacher.name=local-dir:/nowhere", "/nowhere"),
        ("model.img_size=225", "225 is not a multiple"),
        ("model.args={depth:6}", "the key 'depth:6'; YAML wants a space"),
        ("data.flip=0.5", "data.crop=random"),
        ("data.crop=middle", "data.crop"),
        ("data.crop_scale=[0.9, 0.2]", "crop_scale"),
        ("data.train=/nowhere", "/nowhere is not a folder"),
        ("data.train=''", "data.train is empty"),
        ("run_dir=''", "run_dir is empty"),
        ("checkpoint.keep=1", "may leave no checkpoint from before a jump of the loss: keep 2, or"),
        ("optim.warmup_epochs=400", "leaves nothing"),
        ("optim.min_lr=1", "is above optim.lr"),
        ("mapet.hidden_share=0", r"mapet\.hidden_share = 0\.0 hides 0 of 196 patches; hide one at least"),
        ("mapet.predicted_share=0.8", r"predicts 157 of 196 patches, and .* = 0\.75 hides 147"),
        ("mapet.predicted_share=0", r"predicts 0 of 196 patches.*: predict one at least"),
        ("objective=dino", "objective = dino is not known; there are: mapet"),
        ("model=3", "model = 3"),
        ("model.name.x=3", "single value|model.name"),
        ("lr", "a.b=value"),
        ("optim.lr=[", "not valid YAML"),
        ("optm.lr=1", "optm = .* .from the command line. is not a knob; did you mean optim"),
        ("lr=1", r"lr = 1 .from the command line. is not a knob; did you mean optim\.lr\?"),
        ("data.mean=3", r"data.mean = 3 .*a list, e.g. \[1, 2\]"),
        ("data.crop_scale=[1]", r"data.crop_scale = \[1\] .from the command line. has too few values"),
        ("optim=3", "a mapping of keys to values"),
        ("teacher.layer=9", "RN50x64 has 5 layers, 0 .first. to -1 .last."),
        ("tokenizer={vocab_size: 0}", "tokenizer.vocab_size = 0 .from the command line"),
    ],
)
def test_mistakes_are_sentences(recipe, override, says):
    with pytest.raises(ConfigError, match=says):
        check(load_config(recipe, [override]), world_size=2)


def test_a_mistake_in_the_file_names_the_file(recipe):
    recipe.write_text(recipe.read_text() + "optim: {lrr: 1}\n")
    with pytest.raises(ConfigError, match=f"optim.lrr = 1 .from {recipe}.*did you mean optim.lr"):
        load_config(recipe)


def test_a_size_that_fits_no_patch_is_the_only_complaint(recipe):
    with pytest.raises(ConfigError) as caught:
        check(load_config(recipe, ["model.img_size=60"]), 1)
    assert str(caught.value) == "model.img_size = 60 is not a multiple of model.patch_size = 16."


def test_a_mapping_on_the_command_line_adds_its_keys(recipe):
    recipe.write_text(
        recipe.read_text() + "model: {name: vit_small_patch16_224, args: {depth: 3, qkv_bias: false}}\n"
    )
    config = load_config(recipe, ["model={args: {depth: 4}, img_size: 32}", "model.args={num_heads: 2}"])
    assert config.model.args == {"depth": 4, "qkv_bias": False, "num_heads": 2}
    assert (config.model.name, config.model.img_size) == ("vit_small_patch16_224", 32)


def test_a_key_given_twice_is_refused(recipe):
    recipe.write_text(recipe.read_text() + "optim: {lr: 1.0e-3, lr: 2.0e-3}\n")
    with pytest.raises(ConfigError, match="the key lr is there twice"):
        load_config(recipe)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "tokenizer.path=",
            "tokenizer.path is empty: .* the kclip tokenizer reads; tools/fit_codebook.py writes it",
        ),
        ("tokenizer.path={}", "tokenizer.path = .* is not a file"),
        ("run_dir={}/a_file/run", "run_dir = .* can't be used: .*a_file is not a folder"),
        ("run_dir={}/images/run", "run_dir = .* lies inside data.train"),
    ],
)
def test_paths_are_looked_at_before_anything_starts(recipe, tmp_path, override, says):
    (tmp_path / "a_file").touch()
    config = load_config(recipe, [f"tokenizer.path={tmp_path}/a_file", override.format(tmp_path)])
    with pytest.raises(ConfigError, match=says):
        check(config, 1)
        check_files(config)
    check_files(load_config(recipe, [f"tokenizer.path={tmp_path}/a_file"]))
    check_files(load_config(recipe, ["objective=conmim"]))  # needs no tokens


def test_a_mistake_is_said_once_a_host(recipe):
    command = [
        sys.executable,
        "mapet_ds/pretrain.py",
        "--config",
        str(recipe),
        "--deepspeed_config",
        "ds_configs/zero2_cpu.json",
    ]
    for rank, lines in (("0", 1), ("1", 0)):
        environment = {**os.environ, "LOCAL_RANK": rank}
        done = subprocess.run(
            [*command, "seed=-1"], cwd=REPOSITORY, capture_output=True, text=True, env=environment
        )
        assert (done.returncode, done.stderr.count("\n")) == (2, lines)


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "a: [", "!!python/object/apply:os.system ['touch pwned']"])
def test_a_file_that_is_no_recipe(recipe, text):
    recipe.write_text(text)
    with pytest.raises(ConfigError, match=str(recipe)):
        load_config(recipe)


def test_numbers_may_be_written_as_anyone_would(recipe):
    for text in ("1e-3", "1.0e-3", "0.001", "1E-3"):
        assert load_config(recipe, [f"optim.lr={text}"]).optim.lr == 1e-3


def test_inputs_can_be_checked_alone(recipe):
    config = load_config(recipe, ["run_dir=''"])
    check_inputs(config)
    with pytest.raises(ConfigError):
        check(config, 1)


def test_a_mistake_stops_the_program_before_torch_is_imported(recipe):
    command = [sys.executable, "mapet_ds/pretrain.py", "--config", str(recipe)]
    command += ["--deepspeed_config", "ds_configs/zero2_cpu.json", "optim.lrr=3"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("optim.lrr = 3 (from the command line) is not a knob")
    assert "Traceback" not in done.stderr
    imported = "from mapet_ds.training import command_line"
    modules = subprocess.run(
        [sys.executable, "-c", f"import sys; {imported}; print('torch' in sys.modules)"],
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert modules.stdout.strip() == "False", "a check must not wait for torch"


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("seed=010", 10),
        ("seed=0x10", 16),
        ("seed=1_000", 1000),
        ("optim.lr=.5", 0.5),
        ("model.args={depth: 010, at: 1:30}", {"depth": 10, "at": "1:30"}),
        ("model.init_from=null", None),
        ("run_dir=exp #2", "exp #2"),
        ("run_dir='exp 2'", "exp 2"),
        ("run_dir=010", "010"),
        ("run_dir=2024-01-31", "2024-01-31"),
        ("run_dir=[a]", "[a]"),
        ("run_dir=~/runs", str(Path.home() / "runs")),
        ("model.init_from=~", str(Path.home())),
    ],
)
def test_an_override_is_read_by_the_type_of_its_knob(recipe, override, value):
    found = load_config(recipe, [override]).to_dict()
    for part in override.partition("=")[0].split("."):
        found = found[part]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("seed=1:30", "valid integer"),
        ("seed=8 #2", "would be lost"),
        ("run_dir=null", "valid string"),
        ("run_dir=~nobody-of-this-name/x", "no user's home folder"),
    ],
)
def test_an_override_that_yaml_would_make_another_value_of_is_refused(recipe, override, says):
    with pytest.raises(ConfigError, match=says):
        load_config(recipe, [override])


def test_a_recipe_file_is_read_by_the_same_rules(recipe, tmp_path):
    values = yaml.safe_load(recipe.read_text())
    path = tmp_path / "numbers.yaml"
    path.write_text(yaml.safe_dump(values | {"run_dir": "~/x"}) + "seed: 010\n")
    config = load_config(path)
    assert config.seed == 10 and config.run_dir == str(Path.home() / "x")


@pytest.mark.parametrize(
    ("engine", "says"),
    [
        ({"zero_optimization": {"stage": 2}, "train_batch_size": 8}, "train.global_batch_size"),
        ({"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0}, "optim.clip_grad"),
        ({"zero_optimization": {"stage": 2}, "optimizer": {}}, "optim"),
        ({"zero_optimization": {"stage": 2}, "bf61": {}}, "bf61.*meant bf16"),
        ({"zero_optimisation": {"stage": 2}}, "zero_optimisation.*meant zero_optimization"),
        ({"zero_optimization": {"stage": 0}}, "1, 2 or 3"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload"),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, "gradient's norm"),
        ({"zero_optimization": {"stage": 2}, "bf16": {"check_grad_overflow": False}}, "not finite"),
        ([], "JSON object"),
    ],
)
def test_deepspeed_json_holds_engine_knobs_only(tmp_path, engine, says):
    path = tmp_path / "engine.json"
    path.write_text(json.dumps(engine))
    with pytest.raises(ConfigError, match=says):
        load_deepspeed_config(path)


def test_every_knob_round_trips_through_the_written_config(recipe, tmp_path):
    import yaml

    config = load_config(recipe)
    written = tmp_path / "config.yaml"
    written.write_text(yaml.safe_dump(config.to_dict()))
    assert load_config(written) == config
    assert Path(config.run_dir) == tmp_path / "run"
    assert isinstance(config, Config)


WORDS = st.sampled_from(
    sorted({*known_keys(Config), *(key.split(".")[0] for key in known_keys(Config))})
) | st.text(max_size=12)
NUMBERS = st.integers(1, 64) | st.floats(0.01, 1)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | WORDS
    | st.sampled_from(["center", "random", "projected", "pixels", "features", "RN50x64"])
    | st.sampled_from(["mapet", "beit", "mvp", "saim", "conmim", "mae", "cae"])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def test_whatever_it_says_a_recipe_gives_a_run_or_a_sentence(recipe):
    outcomes = []

    @settings(max_examples=400, deadline=None, derandomize=True)
    @given(
        st.lists(st.tuples(WORDS, NUMBERS | VALUES), max_size=2), st.sampled_from([1, 2, 3, 8]), st.booleans()
    )
    def any_recipe(keys, world_size, in_the_file):
        path, overrides = recipe, [f"{key}={json.dumps(value)}" for key, value in keys]
        try:
            if in_the_file:
                values = yaml.safe_load(recipe.read_text())
                for key, value in keys:
                    section, _, knob = key.partition(".")
                    values[section] = {knob: value} if knob else value
                path, overrides = recipe.with_name("any.yaml"), []
                path.write_text(yaml.safe_dump(values))
            found = load_config(path, overrides)
            check(found, world_size)
            assert found.grad_accum_steps(world_size) >= 1
            outcomes.append("run")
        except ConfigError:
            outcomes.append("sentence")

    any_recipe()
    assert min(outcomes.count("run"), outcomes.count("sentence")) > 10, "both must have been tried"


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_whatever_bytes_a_recipe_or_engine_file_has_it_is_a_sentence(tmp_path, data):
    path = tmp_path / "any"
    path.write_bytes(data)
    for load in (load_config, load_deepspeed_config):
        with contextlib.suppress(ConfigError):
            load(path)


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "mapet_ds/recipes").glob("*.yaml")), ids=lambda path: path.stem
)
def test_a_recipe_holds_what_differs_or_under_one_comment_what_is_published(path):
    text, cls = path.read_text(), SETTINGS.get(path.stem.split("_")[0], Config)
    published = "# Published values follow" in text
    assert published != ("# What differs from the defaults follows." in text)
    values = flatten(load_config(path, [], cls).to_dict())
    defaults = flatten(cls().to_dict())
    named = flatten(yaml.load(text, Loader=RecipeLoader))
    same = (
        [name for name in named if name in defaults and values[name] == defaults[name]]
        if not published
        else []
    )
    assert same == []
