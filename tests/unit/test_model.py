"""The Llama: what sees what, its options, its published form."""

import pytest
import torch

from shardwright.conf.load import load_config
from shardwright.kernels import Kernels
from shardwright.models.registry import FAMILIES
from shardwright.parallel.apply import apply, lay_out
from shardwright.parallel.mesh import Mesh

SIZES = [
    "model.vocab_size=64",
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.head_dim=8",
    "model.num_heads=4",
]


def make(*overrides):
    config = load_config([*SIZES, *overrides])
    family = FAMILIES["llama"]
    with torch.device("meta"):
        model = family.build(config.model, Kernels())
    mesh = Mesh.of(config.parallel, num_processes=1, rank=0)
    cpu = torch.device("cpu")
    layout = lay_out(model, family.plan(config.model), mesh, config)
    apply(model, layout, mesh, config, device=cpu, compute_dtype=torch.float32)
    return model


def logits(model, ids, positions):
    bounds = torch.cat([(positions.flatten() == 0).nonzero().flatten(), torch.tensor([positions.numel()])]).int()
    with torch.no_grad():
        return model(ids, positions, bounds, int(bounds.diff().max()))


@pytest.mark.parametrize("options", [[], ["model.parallel_block=true"], ["model.tied_embeddings=false"]], ids=str)
def test_a_token_sees_its_own_document_and_no_later_token(options):
    torch.manual_seed(0)
    model, ids = make(*options), torch.randint(0, 64, (1, 12))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    before = logits(model, ids, positions)
    for changed in range(12):
        other = ids.clone()
        other[0, changed] = (ids[0, changed] + 1) % 64
        moved = (logits(model, other, positions) - before).abs().amax(-1)[0] > 1e-7
        end = 5 if changed < 5 else 12
        assert moved.tolist() == [changed <= t < end for t in range(12)]


def test_a_document_means_the_same_wherever_it_is_packed():
    torch.manual_seed(1)
    model, ids = make(), torch.randint(0, 64, (1, 12))
    packed = logits(model, ids, torch.tensor([[*range(5), *range(7)]]))
    alone = logits(model, ids[:, 5:], torch.arange(7)[None])
    torch.testing.assert_close(packed[:, 5:], alone)


def test_sliding_window_limits_the_reach_of_each_layer():
    torch.manual_seed(2)
    model, ids = make("model.sliding_window=3"), torch.randint(0, 64, (1, 30))
    before = logits(model, ids, torch.arange(30)[None])
    ids[0, 0] = (ids[0, 0] + 1) % 64
    moved = (logits(model, ids, torch.arange(30)[None]) - before).abs().amax(-1)[0] > 1e-9
    reach = 4 * (3 - 1)
    assert moved[:reach].any() and not moved[reach + 1 :].any()


def test_the_parallel_block_is_its_formula():
    torch.manual_seed(3)
    model = make("model.parallel_block=true", "model.num_layers=1")
    captured = {}
    layer = model.layers["0"]
    layer.register_forward_hook(lambda m, args, out: captured.update(x=args[0], context=args[1], out=out))
    logits(model, torch.randint(0, 64, (2, 9)), torch.arange(9).repeat(2, 1))
    x, context = captured["x"], captured["context"]
    normed = layer.attention_norm(x)
    torch.testing.assert_close(captured["out"], x + layer.feed_forward(normed) + layer.attention(normed, context))
    assert layer.feed_forward_norm is None


def test_tied_embeddings_have_one_table():
    names = dict(make().named_parameters())
    assert "head.weight" not in names and "head.weight" in dict(make("model.tied_embeddings=false").named_parameters())


def test_summed_loss_is_the_loss_of_the_logits():
    torch.manual_seed(4)
    model, ids = make(), torch.randint(0, 64, (2, 9))
    labels = torch.randint(0, 64, (2, 9))
    labels[0, 3] = -100
    positions = torch.arange(9).repeat(2, 1)
    bounds = torch.tensor([0, 9, 18], dtype=torch.int32)
    loss = model(ids, positions, bounds, 9, labels)
    logp = logits(model, ids, positions).log_softmax(-1)
    kept = labels != -100
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss.float(), -logp[kept].gather(1, labels[kept][:, None]).sum())


def test_equals_the_published_implementation():
    """Same weights, same logits as LlamaForCausalLM, with Llama 3.1's scaling, grouped queries and untied embeddings."""
    import transformers

    torch.manual_seed(5)
    scaling = ["factor: 8.0", "low_freq_factor: 1.0", "high_freq_factor: 4.0", "original_context_tokens: 16"]
    overrides = ["model.num_kv_heads=2", "model.tied_embeddings=false", f"model.rope_scaling={{{','.join(scaling)}}}"]
    model = make(*overrides)
    config = model.config
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=config.num_layers,
            num_attention_heads=4, num_key_value_heads=2, head_dim=8, rms_norm_eps=config.norm_eps,
            rope_theta=config.rope_theta, tie_word_embeddings=False, max_position_embeddings=128,
            rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 16},
        )
    )  # fmt: skip
    renames = [
        ("embedding.", "model.embed_tokens."), ("layers.", "model.layers."), ("norm.weight", "model.norm.weight"),
        ("head.", "lm_head."), ("attention_norm", "input_layernorm"), ("feed_forward_norm", "post_attention_layernorm"),
        ("feed_forward.", "mlp."), (".gate.", ".gate_proj."), (".up.", ".up_proj."), (".down.", ".down_proj."),
        ("attention.", "self_attn."), (".q.", ".q_proj."), (".k.", ".k_proj."), (".v.", ".v_proj."), (".o.", ".o_proj."),
    ]  # fmt: skip
    state = {}
    for name, value in model.state_dict().items():
        for ours, published in renames:
            if ours in ("layers.", "embedding.", "head.", "norm.weight"):
                name = published + name.removeprefix(ours) if name.startswith(ours) else name
            else:
                name = name.replace(ours, published)
        state[name] = value
    theirs.load_state_dict(state)
    ids = torch.randint(0, 64, (2, 40))
    with torch.no_grad():
        expected = theirs(ids).logits
    torch.testing.assert_close(logits(model, ids, torch.arange(40).repeat(2, 1)), expected, atol=1e-5, rtol=1e-4)
