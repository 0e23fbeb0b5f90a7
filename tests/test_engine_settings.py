"""Every key that a DeepSpeed JSON may hold trains as torch's AdamW does, and saves what the forward uses."""

import json

import pytest
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from test_engine import HERE, torchrun

from mapet_ds.config.engine import BF16, REFUSED, EngineKeys, load_deepspeed_config
from mapet_ds.config.sections import REPOSITORY
from mapet_ds.errors import ConfigError
from mapet_ds.training.engine import check_engine_config

STAGE = {"stage", "stage3_param_persistence_threshold"}
ZERO = {
    "allgather_bucket_size": 500, "allgather_partitions": False, "contiguous_gradients": False,
    "elastic_checkpoint": True, "enable_sanity_checks": True, "ignore_unused_parameters": False,
    "load_from_fp32_weights": False, "log_trace_cache_warnings": True, "overlap_comm": True,
    "parameter_alignment": True, "reduce_bucket_size": 500, "reduce_scatter": False,
    "save_muon_momentum_buffer_in_memory": True, "use_multi_rank_bucket_allreduce": False,
}  # fmt: skip
ZERO3 = {
    "leaf_module": {"names": ["Block"]}, "memory_efficient_linear": False, "override_module_apply": False,
    "pipeline_loading_checkpoint": True, "reduce_scatter": False, "stage3_allgather_sequential": True,
    "stage3_gather_16bit_weights_on_model_save": True, "stage3_gather_fp16_weights_on_model_save": True,
    "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_model_persistence_threshold": 0,
    "stage3_module_granularity_threshold": 100, "stage3_prefetch_bucket_size": 0,
    "stage3_use_all_reduce_for_fetch_params": True, "sub_group_size": 500, "zero_hpz_partition_size": 2,
}  # fmt: skip
TOP = {
    "comms_logger": {"enabled": True}, "dump_state": True, "flops_profiler": {"enabled": True},
    "memory_breakdown": True, "wall_clock_breakdown": True, "communication_data_type": "fp32",
    "data_types": {"grad_accum_dtype": "fp32"},
}  # fmt: skip
SCALED = {"prescale_gradients": True, "gradient_predivide_factor": 4.0}
BFLOAT = {
    "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32",
}  # fmt: skip
SCRAMBLED = {"zero_optimization": {"stage": 2, "round_robin_gradients": True}}


def allowed():
    """DeepSpeed JSONs by name: the shipped ones, and every key at another value than its default."""
    shipped = (REPOSITORY / "ds_configs").glob("zero?.json")
    engines = {path.stem: json.loads(path.read_text()) for path in shipped}
    for stage, values in ((1, ZERO), (2, ZERO), (3, ZERO3)):
        zero = {"stage": stage, **({"stage3_param_persistence_threshold": 0} if stage == 3 else {})}
        overlapping = engines[f"zero{stage}"]["zero_optimization"] | zero | {"reduce_bucket_size": 500}
        engines[f"zero{stage} in fp32"] = {"zero_optimization": overlapping}
        for part in range(4 if stage > 1 else 0):  # an engine for each key would take minutes
            some = dict(list(values.items())[part::4])
            engines[f"{', '.join(some)} at {stage}"] = {"zero_optimization": zero | some}
        unscattered = {"zero_optimization": {**zero, "reduce_scatter": False}}
        engines[f"scaled at {stage}"] = unscattered | SCALED
        early = {"enabled": True, "immediate_grad_update": True}
        engines[f"immediate_grad_update at {stage}"] = {**BFLOAT, "zero_optimization": zero, "bf16": early}
    return engines | {"all others": {"zero_optimization": {"stage": 2}, **TOP}}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("engines") / "engines.json"
    path.write_text(json.dumps({**allowed(), "scrambled": SCRAMBLED}))
    torchrun(2, HERE / "engine_settings_worker.py", path)
    return json.loads(path.with_suffix(".found").read_text())


def test_every_key_of_deepspeed_is_tried_or_refused():
    fields = DeepSpeedZeroConfig.model_fields
    zero = {f"zero_optimization.{field.alias or name}" for name, field in fields.items()}
    tried = {f"zero_optimization.{key}" for key in STAGE | ZERO.keys() | ZERO3.keys()}
    assert zero == tried | {key for key in REFUSED if key.startswith("zero")}
    bf16 = {"enabled", "immediate_grad_update"} | {key[5:] for key in REFUSED if key.startswith("bf16.")}
    assert set(DeepSpeedBF16Config.model_fields) == bf16 == set(vars(BF16()))
    assert {*TOP, *SCALED, "zero_optimization", "bf16"} == set(vars(EngineKeys()))


@pytest.mark.parametrize("name", allowed())
def test_an_allowed_key_trains_and_saves_as_adamw_does(found, name, tmp_path):
    """Gathered weights equal the module's own, or gather_state had refused; both equal plain AdamW's."""
    (tmp_path / "engine.json").write_text(json.dumps(allowed()[name]))
    check_engine_config(load_deepspeed_config(tmp_path / "engine.json"))
    within = {"norms": 5e-3, "weights": 2e-2, "moments": 1e-2} if "bf16" in allowed()[name] else {}
    assert isinstance(found[name], dict), found[name]
    for what, difference in found[name].items():
        assert difference <= within.get(what, 5e-7), what


def test_no_checkpoint_of_other_weights_than_the_forwards(found):
    assert "in 20 of 23 parameters (vit.pos_embed first), so nothing was written" in found["scrambled"]


@pytest.mark.parametrize("key", REFUSED)
def test_what_loses_weights_or_updates_is_refused(key, tmp_path):
    section, _, name = key.partition(".")
    default, reason = REFUSED[key]
    for value in (default, {} if default is None else not default):
        engine = {"zero_optimization": {"stage": 2}, section: {name: value}}
        engine.setdefault("zero_optimization", {})["stage"] = 2
        (tmp_path / "engine.json").write_text(json.dumps(engine))
        if value == default:
            load_deepspeed_config(tmp_path / "engine.json")
        else:
            with pytest.raises(ConfigError, match=f"{key} = .*{reason}"):
                load_deepspeed_config(tmp_path / "engine.json")


@pytest.mark.parametrize(
    ("engine", "says"),
    [
        ({"bf16": {"enabled": "auto"}}, 'bf16.enabled = "auto": .* a valid boolean'),
        ({"bf16": {"enabld": True}}, "bf16.enabld.*meant bf16.enabled"),
        ({"data_types": {"grad_accum_dtype": "float32"}}, "'fp32', 'bf16' or 'fp16'"),
        ({"comms_logger": True}, "comms_logger = true"),
        ({"prescale_gradients": True}, "prescale_gradients.*stage 2.*reduce_scatter"),
        ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor.*stage 2.*reduce_scatter"),
        ({"zero_optimization": {"stage": 2, "overlap_comm": "auto"}}, "overlap_comm = auto.*transformers"),
    ],
)
def test_what_deepspeed_ignores_or_asserts_is_a_sentence(engine, says, tmp_path):
    (tmp_path / "engine.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, **engine}))
    with pytest.raises(ConfigError, match=says):
        load_deepspeed_config(tmp_path / "engine.json")
