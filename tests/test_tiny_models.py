"""The tiny models themselves: each runs, is the same every time, and shows what its family is in the list for."""

from functools import partial

import pytest
import torch

from tests.families import EAGER_ONLY, LENGTH_DEPENDENT, REFUSED, SUPPORTED, VOCAB_SIZE, WINDOW

BOUNDED = {name: factory for name, (factory, _) in LENGTH_DEPENDENT.items()}
ALL = SUPPORTED | BOUNDED | REFUSED
INPUT_IDS = torch.randint(3, VOCAB_SIZE, (1, 40), generator=torch.Generator().manual_seed(0))
SLIDING = [name for name, factory in SUPPORTED.items() if "sliding_window" in factory.keywords]


def _run(model, input_ids=INPUT_IDS):
    encoder_decoder = {"decoder_input_ids": input_ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids, **encoder_decoder)[0]


@pytest.mark.parametrize("name", ALL)
def test_each_runs_on_40_tokens_and_is_the_same_every_time(name):
    model = ALL[name]()
    assert sum(parameter.numel() for parameter in model.parameters()) < 2 * 10**6, "tests make hundreds of these"
    output = _run(model)
    assert output.shape[:2] == (1, 40)
    assert output.isfinite().all()
    assert output.std() > 0.2
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    torch.testing.assert_close(_run(ALL[name]()), output, rtol=0, atol=0)


@pytest.mark.parametrize("name", SUPPORTED)
def test_no_parameter_is_left_at_its_trivial_value(name):
    for parameter_name, parameter in SUPPORTED[name]().named_parameters():
        assert parameter.numel() == 1 or parameter.std() > 0.02, parameter_name


@pytest.mark.parametrize("name", SUPPORTED)
def test_earlier_tokens_change_the_last_logits(name):
    """Or else every control of the engine would pass on a model that hardly attends."""
    model = SUPPORTED[name]()
    change = (_run(model)[0, -1] - _run(model, INPUT_IDS[:, 20:])[0, -1]).abs().max()
    assert change > 0.3


@pytest.mark.parametrize("name", SLIDING)
def test_the_window_is_shorter_than_the_prompt(name):
    factory = SUPPORTED[name]
    assert factory.keywords["sliding_window"] == WINDOW
    wide = partial(factory.func, *factory.args, **(factory.keywords | {"sliding_window": 512}))
    assert (_run(factory()) - _run(wide())).abs().max() > 0.1


@pytest.mark.parametrize("name", SUPPORTED)
def test_attention_is_the_models_own_and_agrees_with_eager(name):
    model = SUPPORTED[name]()
    implementation = model.config._attn_implementation
    assert implementation == ("eager" if model.config.model_type in EAGER_ONLY else "sdpa")
    output = _run(model)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(_run(model), output, rtol=0, atol=1e-4)


@pytest.mark.parametrize("model_type", sorted(EAGER_ONLY))
def test_sdpa_is_refused_where_it_would_be_wrong(model_type):
    with pytest.raises(ValueError, match="does not support an attention implementation"):
        SUPPORTED[model_type]().set_attn_implementation("sdpa")
