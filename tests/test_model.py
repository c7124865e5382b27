"""A forward pass as a user of transformers meets it: shapes, loss, and clear errors."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from midskip import MidskipForCausalLM, MidskipModel
from midskip.testing import reference_forward

Make = Callable[..., MidskipForCausalLM]
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def prompt(*shape: int) -> Tensor:
    return torch.randint(3, 31, shape)


# ---- shapes


@pytest.mark.parametrize(("num_layers", "shape"), [(1, (1, 1)), (2, (3, 1)), (5, (1, 7)), (6, (2, 63))])
def test_outputs_have_their_shapes(make_model: Make, num_layers: int, shape: tuple[int, int]) -> None:
    model = make_model(num_hidden_layers=num_layers, dtype=torch.float32).eval()
    output = model(prompt(*shape), output_hidden_states=True)
    assert output.logits.shape == (*shape, 31) and output.logits.dtype == torch.float32
    assert output.gates.shape == (num_layers, *shape) and output.gates.dtype == torch.float32
    assert output.depth_scores.shape == ((num_layers + 1) // 2, *shape)
    assert len(output.hidden_states) == num_layers + 1
    assert all(hidden.shape == (*shape, 16) for hidden in output.hidden_states)
    assert output.loss is None and output.logits.isfinite().all()
    assert torch.equal(output.gates, output.gates.flip(0))  # the way up mirrors the way down
    num_gates = (num_layers + 1) // 2
    assert torch.equal(output.gates[:num_gates], (1 - output.depth_scores).clamp(min=0))


@pytest.mark.parametrize("skipped_kv", ["drop", "keep"])
@pytest.mark.parametrize("heads, key_heads, head_dim", [(4, 4, None), (4, 1, None), (4, 2, 6), (1, 1, None)])
def test_grouped_heads(make_model: Make, skipped_kv: str, heads: int, key_heads: int, head_dim: int | None) -> None:
    model = make_model(
        num_attention_heads=heads, num_key_value_heads=key_heads, head_dim=head_dim, skipped_kv=skipped_kv
    )
    ids_BT = prompt(2, 7)
    torch.testing.assert_close(model(ids_BT).logits, reference_forward(model, ids_BT).logits, rtol=1e-10, atol=1e-10)
    width = model.config.head_dim
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (key_heads * width, 16)
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (heads * width, 16)


@pytest.mark.parametrize("tied", [False, True])
def test_dense_pre_norm_model_is_a_llama(make_model: Make, tied: bool) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    model = make_model(
        policy="dense", norms="pre", tie_word_embeddings=tied, rope_parameters=rope, head_dim=8, dtype=torch.float32
    )
    config = model.config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    llama = LlamaForCausalLM(
        LlamaConfig(
            **{name: getattr(config, name) for name in names},
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=64,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters=rope,
            tie_word_embeddings=tied,
            attn_implementation="eager",
        )
    )
    renamed = {
        name.replace("pre_feedforward_layernorm", "post_attention_layernorm"): x
        for name, x in model.state_dict().items()
    }
    llama.load_state_dict(renamed)
    ids_BT, mask_BT = prompt(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask_BT[0, :3] = 0
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    expected = llama(ids_BT, attention_mask=mask_BT, position_ids=positions_BT).logits
    got = model(ids_BT, attention_mask=mask_BT).logits
    valid_BT = mask_BT.bool()
    torch.testing.assert_close(got[valid_BT], expected[valid_BT], rtol=1e-4, atol=1e-5)
    # several documents in a row, which both tell from positions that start again (Llama only without a cache)
    positions_BT = torch.tensor([[0, 1, 2, 3, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 0, 1]])
    expected = llama(ids_BT, position_ids=positions_BT, use_cache=False).logits
    assert (expected - llama(ids_BT).logits)[:, -1].abs().max() > 1e-2
    torch.testing.assert_close(model(ids_BT, position_ids=positions_BT).logits, expected, rtol=1e-4, atol=1e-5)
    assert model(ids_BT).depth_scores is None and (model(ids_BT).gates == 1).all()


def test_hidden_states_only_when_asked(make_model: Make) -> None:
    model, ids_BT = make_model().eval(), prompt(2, 5)
    assert model(ids_BT).hidden_states is None and model.model(ids_BT).hidden_states is None
    output = model.model(ids_BT, output_hidden_states=True)
    assert len(output.hidden_states) == 5
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    torch.testing.assert_close(model.lm_head(output.last_hidden_state), model(ids_BT).logits)
    model.config.output_hidden_states = True
    assert len(model(ids_BT).hidden_states) == 5
    with torch.no_grad():
        model.config.output_hidden_states = False
        first = model(ids_BT, output_hidden_states=True)
        kept = [hidden.clone() for hidden in first.hidden_states]
        model(ids_BT)
        assert all(torch.equal(a, b) for a, b in zip(first.hidden_states, kept, strict=True))
        assert not torch.equal(kept[0], kept[-1])


def test_return_dict_false_gives_a_tuple(make_model: Make) -> None:
    model, ids_BT = make_model().eval(), prompt(2, 5)
    output = model(ids_BT, labels=ids_BT)
    found = model(ids_BT, labels=ids_BT, return_dict=False)
    assert isinstance(found, tuple) and len(found) == 6
    for got, expected in zip(found, (output.loss, output.logits, output.gates, output.depth_scores), strict=False):
        assert torch.equal(got, expected)
    assert torch.equal(found[4], output.executed) and found[5] == output.executed_share
    assert isinstance(model.model(ids_BT, return_dict=False), tuple)


def test_embeddings_in_place_of_ids(make_model: Make) -> None:
    ids_BT = prompt(2, 5)
    for norms in ("sandwich", "pre"):
        model = make_model(norms=norms).eval()
        embedded_BTD = model.model.embed_tokens(ids_BT).detach()
        before_BTD = embedded_BTD.clone()
        with torch.no_grad():
            output = model(inputs_embeds=embedded_BTD)
        assert (output.gates == 0).any() and (output.gates > 0).any()
        assert torch.equal(embedded_BTD, before_BTD)
        assert torch.equal(output.logits, model(ids_BT).logits)
        weight_VD = model.model.embed_tokens.weight.clone()
        with torch.no_grad():
            model(ids_BT)
        assert torch.equal(model.model.embed_tokens.weight, weight_VD)


def test_positions(make_model: Make) -> None:
    model, ids_BT = make_model(gates="open").eval(), prompt(2, 6)
    expected = model(ids_BT).logits
    assert torch.equal(model(ids_BT, position_ids=torch.arange(6)[None]).logits, expected)
    shifted = model(ids_BT, position_ids=torch.arange(6).expand(2, 6) + 40).logits
    torch.testing.assert_close(shifted, expected, rtol=1e-6, atol=1e-6)  # rotary positions are relative
    stretched = model(ids_BT, position_ids=torch.arange(0, 12, 2)[None]).logits
    assert (stretched - expected).abs().max() > 1e-4
    mixed = model(ids_BT, position_ids=torch.stack((torch.arange(6), torch.arange(0, 12, 2)))).logits
    torch.testing.assert_close(mixed, torch.stack((expected[0], stretched[1])))


def test_head_on_the_last_positions_only(make_model: Make) -> None:
    model, ids_BT = make_model().eval(), prompt(2, 7)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, :3] = 0
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda module, arguments, output: rows.append(output.shape[:-1].numel()))
    full = model(ids_BT, attention_mask=mask_BT).logits
    for keep, columns in (
        (0, slice(None)), (1, slice(-1, None)), (3, slice(-3, None)), (7, slice(None)), (100, slice(None)),
        (torch.tensor([0, 5]), [0, 5]), (torch.tensor([4]), [4]),
    ):  # fmt: skip
        got = model(ids_BT, attention_mask=mask_BT, logits_to_keep=keep).logits
        torch.testing.assert_close(got * mask_BT[:, columns, None], full[:, columns], rtol=1e-12, atol=1e-12)
    assert rows == [11, 11, 2, 6, 14, 14, 4, 2]  # the head itself ran on no more


# ---- loss


def test_loss_is_the_mean_over_what_is_predicted(make_model: Make) -> None:
    model, ids_BT = make_model(), prompt(3, 7)
    mask_BT = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])
    labels_BT = ids_BT.clone()
    labels_BT[0, 3] = labels_BT[2, 1] = -100
    output = model(ids_BT, attention_mask=mask_BT, labels=labels_BT)
    pieces = []
    for b in range(3):
        for t in range(6):
            if mask_BT[b, t] and mask_BT[b, t + 1] and labels_BT[b, t + 1] != -100:
                pieces.append(F.cross_entropy(output.logits[b, t], labels_BT[b, t + 1]))
    assert len(pieces) == 6 + 4 + 3 - 2
    torch.testing.assert_close(output.loss, torch.stack(pieces).mean())
    at_pads = torch.where(mask_BT.bool(), labels_BT, 5)
    assert torch.equal(model(ids_BT, attention_mask=mask_BT, labels=at_pads).loss, output.loss)
    assert output.loss.ndim == 0


@pytest.mark.parametrize("nothing", ["labels", "pads", "one token"])
def test_nothing_to_predict_gives_a_loss_of_zero(make_model: Make, nothing: str) -> None:
    model, ids_BT = make_model(), prompt(2, 1 if nothing == "one token" else 5)
    mask_BT = torch.zeros_like(ids_BT) if nothing == "pads" else None
    labels_BT = ids_BT * 0 - 100 if nothing == "labels" else ids_BT
    loss = model(ids_BT, attention_mask=mask_BT, labels=labels_BT).loss
    loss.backward()
    assert loss == 0
    assert all((x.grad == 0).all() for name, x in model.named_parameters() if x.grad is not None)


def test_a_batch_of_pads_only(make_model: Make) -> None:
    model, ids_BT = make_model(), prompt(2, 5)
    mask_BT = torch.zeros_like(ids_BT)
    output = model(ids_BT, attention_mask=mask_BT, labels=ids_BT)
    assert (output.logits == 0).all() and (output.gates == 0).all() and (output.depth_scores == 0).all()
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and (parameter.grad == 0).all(), name
    with torch.no_grad():
        assert (model.eval()(ids_BT, attention_mask=mask_BT).logits == 0).all()


# ---- clear errors


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "give exactly one of input_ids and inputs_embeds"),
        ({"input_ids": prompt(1, 2), "inputs_embeds": torch.zeros(1, 2, 16)}, "give exactly one of"),
        ({"input_ids": prompt(5)}, r"the input has the shape \[5\]; expected \[B, T\]"),
        ({"input_ids": prompt(2, 0)}, r"the input has the shape \[2, 0\]; .*with at least one token"),
        ({"input_ids": prompt(0, 2)}, r"the input has the shape \[0, 2\]"),
        ({"inputs_embeds": torch.zeros(2, 5)}, r"the input has the shape \[2, 5\]; expected \[B, T, 16\]"),
        ({"inputs_embeds": torch.zeros(2, 5, 15)}, r"the input has the shape \[2, 5, 15\]; expected \[B, T, 16\]"),
        ({"input_ids": prompt(1, 65)}, r"has 65 tokens and this model takes at most 64 \(max_position_embeddings\)"),
        ({"inputs_embeds": torch.zeros(1, 65, 16)}, "has 65 tokens and this model takes at most 64"),
        ({"input_ids": torch.tensor([[3, 31]])}, "input_ids reach from 3 to 31; this model's vocabulary is 0 to 30"),
        ({"input_ids": torch.tensor([[-1, 3]])}, "input_ids reach from -1 to 3; .*the model's own tokenizer"),
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask has the shape \[2, 4\]; expected \[2, 5\]"),
        ({"attention_mask": torch.ones(2, 1, 5, 5)}, r"attention_mask has the shape \[2, 1, 5, 5\]; expected \[2, 5\]"),
        ({"labels": prompt(2, 4)}, r"labels has the shape \[2, 4\]; expected \[2, 5\]"),
        ({"labels": prompt(2, 5), "logits_to_keep": 1}, "labels need the logits of all columns"),
        ({"labels": prompt(2, 5), "logits_to_keep": torch.tensor([0])}, "leave logits_to_keep out"),
        ({"position_ids": torch.arange(5)}, r"position_ids has the shape \[5\]; expected \[2, 5\]"),
        ({"position_ids": torch.zeros(3, 5).long()}, r"position_ids has the shape \[3, 5\]"),
        ({"position_ids": torch.zeros(2, 4).long()}, r"position_ids has the shape \[2, 4\]"),
        ({"position_ids": torch.arange(60, 65)[None]}, "position_ids reach from 60 to 64; this model takes 0 to 63"),
        ({"position_ids": torch.arange(-1, 4)[None]}, "position_ids reach from -1 to 3"),
    ],
)
def test_wrong_input_is_refused(make_model: Make, arguments: dict, message: str) -> None:
    model = make_model(dtype=torch.float32)
    if arguments and not {"input_ids", "inputs_embeds"} & arguments.keys():
        arguments = {"input_ids": prompt(2, 5)} | arguments
    with pytest.raises(ValueError, match=message):
        model(**arguments)


def test_the_longest_input_works_and_generation_past_it_is_refused(make_model: Make) -> None:
    model = make_model(dtype=torch.float32, max_position_embeddings=12).eval()
    assert model(prompt(1, 12)).logits.shape == (1, 12, 31)
    with pytest.raises(ValueError, match="has 13 tokens and this model takes at most 12"):
        model(prompt(1, 13))
    with pytest.raises(ValueError, match="prompt and new tokens make 14 tokens; this model takes at most 12 and one"):
        model.generate(prompt(1, 8), max_new_tokens=6, do_sample=False)
    assert model.generate(prompt(1, 8), max_new_tokens=5, do_sample=False).shape == (1, 13)


def test_blocks_stay_whole_when_a_model_is_split(make_model: Make) -> None:
    model = make_model()
    assert {type(block).__name__ for block in model.model.layers} == set(MidskipModel._no_split_modules)
    assert isinstance(model.get_input_embeddings(), nn.Embedding)
    assert model.get_output_embeddings() is model.lm_head
