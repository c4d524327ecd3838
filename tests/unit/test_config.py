"""Configurations: changed by dotted path, compared, fingerprinted, written and read back; mistakes are explained."""

import dataclasses
import itertools
import json

import pytest

from experiments import recipes
from glm_jax import config
from glm_jax.config import ConfigError, Model, Run, Stage, canonical, diff, fingerprint, flatten, grid, replace

RECIPES = sorted(recipes.RECIPES)


@pytest.fixture
def tiny() -> Run:
    return recipes.get("tiny")


def test_replace_reaches_every_kind_of_field(tiny):
    changes = {
        "name": "other",
        "model.E": 32,
        "pretrain.0.tokens": 10**6,
        "pretrain.1.mixture.code": 0.5,
        "data.paths": ("a", "b"),
        "mesh.fsdp": 4,
    }
    changed = replace(tiny, **changes)
    assert {path: flatten(changed)[path] for path in changes} == changes
    assert diff(changed, tiny) == {path: (flatten(tiny)[path], value) for path, value in changes.items()}
    assert replace(changed, **{path: flatten(tiny)[path] for path in changes}) == tiny


def test_replace_keeps_the_original(tiny):
    before = fingerprint(tiny)
    replace(tiny, **{"pretrain.0.mixture.code": 0.9, "model.D": 256})
    assert fingerprint(tiny) == before


def test_replace_takes_changes_in_any_order(tiny):
    changes = {"schedule.batch_tokens_start": 8192, "schedule.batch_tokens": 8192, "pretrain.0.microbatch_rows": 32}
    for order in itertools.permutations(changes.items()):
        assert flatten(replace(tiny, **dict(order))).items() >= changes.items()


def test_a_whole_value_comes_before_its_parts(tiny):
    whole, part = {"model": Model(L=5)}, {"model.E": 32}
    assert replace(tiny, **whole, **part) == replace(tiny, **part, **whole) == replace(tiny, model=Model(L=5, E=32))


def test_every_path_of_flatten_is_one_that_replace_takes(tiny):
    for path, value in flatten(tiny).items():
        assert replace(tiny, **{path: value}) == tiny


def test_grid_is_every_combination_of_the_axes(tiny):
    runs = list(grid(tiny, **{"model.E": (8, 16), "loop.seed": (0, 1, 2)}))
    assert [tuple(changes.values()) for changes, _ in runs] == [(e, s) for e in (8, 16) for s in (0, 1, 2)]
    assert all((run.model.E, run.loop.seed) == tuple(changes.values()) for changes, run in runs)
    assert len({fingerprint(run) for _, run in runs}) == 6


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_run_writes_is_what_is_read(name):
    run = recipes.get(name)
    read = config.from_canonical(json.loads(json.dumps(canonical(run))))
    assert read == run
    assert type(read) is Run
    assert fingerprint(read) == fingerprint(run)


def test_fingerprints_are_equal_exactly_where_configurations_are(tiny):
    for path, value in flatten(tiny).items():
        nudged = not value if isinstance(value, bool) else value * 2 if isinstance(value, int | float) else value
        try:
            changed = replace(tiny, **{path: nudged})
        except ConfigError:
            continue  # twice the value broke a rule: another test's matter
        assert (fingerprint(changed) == fingerprint(tiny)) == (changed == tiny), path


def test_a_fingerprint_does_not_depend_on_the_order_of_a_mixture():
    one, other = ({"code": 0.5, "math": 0.5}, {"math": 0.5, "code": 0.5})
    assert fingerprint(_stage(mixture=one)) == fingerprint(_stage(mixture=other))


def test_a_fingerprint_knows_the_class():
    @dataclasses.dataclass(frozen=True)
    class Loss:
        sequence_balance: float = 1e-4

    @dataclasses.dataclass(frozen=True)
    class Other:
        sequence_balance: float = 1e-4

    assert fingerprint(Loss()) == fingerprint(config.Loss())
    assert fingerprint(Other()) != fingerprint(config.Loss())


@pytest.mark.parametrize(
    ("changes", "value_rule_way_out"),
    [
        ({"model.K": 3}, ("K=3", "N=4", "divisor of 4")),
        ({"model.A": 17}, ("A=17", "E=16", "at most 16")),
        ({"model.D": 0}, ("D=0", "at least 1")),
        ({"model.rope_fraction": 1.1}, ("rope_fraction=1.1", "H=32", "at most 1")),
        ({"model.rope_fraction": 1.0, "model.H": 9}, ("H=9", "even H")),
        ({"schedule.final_lr": 1.0}, ("final_lr=1.0", "0..peak_lr")),
        ({"schedule.batch_tokens": 8193}, ("8193", "microbatch_tokens=2048", "stage1")),
        ({"pretrain.0.seq_len": 8192}, ("seq_len=8192", "max_positions=4096")),
        ({"pretrain.0.mixture": {"code": -1.0}}, ("stage1", "-1.0", ">= 0")),
        ({"pretrain.1.name": "stage1"}, ("stage1", "must differ")),
        ({"mesh.data": -1}, ("-1", "at most one")),
        ({"model.dispatch": "raged"}, ("dispatch='raged'", "did you mean 'ragged'", "None")),
        ({"model.remat": "layr"}, ("remat='layr'", "did you mean 'layer'", "known: none, layer, offload")),
        ({"model.dtype": "bf16"}, ("dtype='bf16'", "did you mean 'bfloat16'")),
        ({"model.implementation": "xlaa"}, ("implementation='xlaa'", "did you mean 'xla'")),
        ({"optim.name": "adam"}, ("name='adam'", "did you mean 'adamw'")),
        ({"optim.nesterov": "no"}, ("nesterov='no'", "known: False, True")),
        ({"schedule.kind": "wds"}, ("kind='wds'", "did you mean 'wsd'")),
        ({"post.self_distillation": 2}, ("self_distillation=2", "known: False, True")),
        ({"data.held_out": 0.5}, ("held_out=0.5", "(0, 0.5)")),
        ({"model.init_std": -0.02}, ("init_std=-0.02", "must not be negative")),
        ({"model.max_positions": -1}, ("max_positions=-1", "at least 1")),
        ({"model.rope_theta": 0.0}, ("rope_theta=0.0", "must be positive")),
        ({"optim.adam_b1": 1.0}, ("adam_b1=1.0", "[0, 1)")),
        ({"optim.adam_b2": 1.0}, ("adam_b2=1.0", "[0, 1)")),
        ({"optim.adam_eps": 0.0}, ("adam_eps=0.0", "must be positive")),
        ({"optim.update_rms": -0.2}, ("update_rms=-0.2", "0 is none")),
        ({"optim.weight_decay": -0.1}, ("weight_decay=-0.1", "0 is none")),
        ({"optim.weight_decay": float("nan")}, ("weight_decay=nan", "0 is none")),
        ({"schedule.warmup_tokens": -1}, ("warmup_tokens=-1", "0 is none")),
        ({"schedule.batch_ramp_tokens": -1}, ("batch_ramp_tokens=-1", "0 is none")),
        ({"schedule.mtp_weight_start": -0.3}, ("mtp_weight_start=-0.3", "0 is none")),
        ({"schedule.mtp_weight": -0.1}, ("mtp_weight=-0.1", "0 is none")),
        ({"schedule.bias_rate": -1e-3}, ("bias_rate=-0.001", "0 is none")),
        ({"schedule.bias_freeze_tokens": -1}, ("bias_freeze_tokens=-1", "0 is from the start")),
        ({"pretrain.1.rope_theta": 0.0}, ("stage2", "rope_theta=0.0", "must be positive")),
        ({"post.unify.sft.peak_lr": -1.0}, ("peak_lr=-1.0", "0..")),
        ({"post.unify.sft.final_lr": 1.0}, ("final_lr=1.0", "0..peak_lr")),
        ({"post.unify.sft.evals": -1}, ("evals=-1", "0 is none")),
        ({"post.unify.grpo.peak_lr": -1.0}, ("peak_lr=-1.0", "0 is none")),
        ({"post.unify.grpo.warmup_steps": -3}, ("warmup_steps=-3", "0 is none")),
    ],
)
def test_a_broken_rule_names_value_rule_and_way_out(tiny, changes, value_rule_way_out):
    with pytest.raises(ConfigError) as error:
        replace(tiny, **changes)
    for part in value_rule_way_out:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("path", "offered"),
    [
        ("modle.E", "modle: Run has no field 'modle'; did you mean 'model'"),
        ("model.rope_teta", r"model\.rope_teta: .*'rope_theta'"),
        ("pretrain.7.tokens", "index below 2"),
        ("pretrain.0.mixture.genral", r"no 'genral' to change; did you mean 'general'\? .*; to add one, give all"),
        ("pretrain.0.mixture.genral.x", "did you mean 'general'"),
    ],
)
def test_an_unknown_path_offers_the_nearest(tiny, path, offered):
    with pytest.raises(ConfigError, match=offered):
        replace(tiny, **{path: 1})


def test_nothing_lies_below_a_number(tiny):
    with pytest.raises(ConfigError, match=r"model\.E: nothing lies below int"):
        replace(tiny, **{"model.E.x": 1})


def test_an_unknown_recipe_offers_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown recipe 'tinny'; did you mean 'tiny'\? known: .*glm45"):
        recipes.get("tinny")


@pytest.mark.parametrize(
    ("written", "offered"),
    [({"class": "Modle"}, "'Model'"), ({"class": "Loss", "sequence_balanc": 0.0}, "'sequence_balance'")],
)
def test_a_file_of_another_version_is_refused_by_name(written, offered):
    with pytest.raises(ConfigError, match=offered):
        config.from_canonical(written)


def test_derived_sizes():
    model = Model(D=64, N=8, K=2, H=16, L=5, dense_layers=2)
    assert (model.G, model.U, model.rotary, model.moe_layers, model.router_rows) == (4, 128, 8, 3, 4)
    assert model.size("E") == model.E
    with pytest.raises(ConfigError, match="'T' is not a model size"):
        model.size("T")


def test_tokens_before_a_stage(tiny):
    first, second = tiny.pretrain
    assert tiny.tokens_before("stage1") == 0
    assert tiny.tokens_before("midtrain") == first.tokens + second.tokens
    assert tiny.total_tokens == sum(stage.tokens for stage in tiny.stages)


def _stage(**changes) -> Stage:
    return Stage(**{"name": "s", "tokens": 1024, "seq_len": 64, "rope_theta": 1e4, "microbatch_rows": 2, **changes})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"post.unify.grpo.rollouts_in_8_bits": True}, "set clip_c=2"),
        ({"post.unify.grpo.clip_c": 1.2}, r"clip_c=1.2 must lie above 1 \+ clip_high=1.28"),
        (
            {"post.unify.grpo.rollouts_in_8_bits": True, "post.unify.grpo.clip_c": 2.0, "mesh.tensor": 2},
            r"mesh.tensor=2 would split .* use mesh.expert or mesh.fsdp",
        ),
    ],
)
def test_rollouts_in_8_bits_that_would_not_train_well(tiny, changes, told):
    with pytest.raises(ConfigError, match=told):
        replace(tiny, **changes)
