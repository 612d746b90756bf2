"""Parameters, FLOPs and activations of transformers, against published tables and formulas."""

import pytest

from hpclab.data import table
from hpclab.forecast import A100, H100, Transformer, hfu, mfu
from hpclab.forecast.throughput import training_s

MPT = {
    "125m": (12, 768, 12),
    "350m": (24, 1024, 16),
    "760m": (24, 1536, 12),
    "1b": (24, 2048, 16),
    "3b": (32, 2560, 20),
    "7b": (32, 4096, 32),
    "13b": (40, 5120, 40),
    "30b": (48, 7168, 56),
    "70b": (80, 8192, 64),
}
"""Layers, hidden size and heads in llm-foundry's configurations; 50,368 words."""


def gpt(layers, hidden, heads, vocabulary=51_200, sequence=2048):
    return Transformer(layers, hidden, heads, 4 * hidden, vocabulary, sequence, gated=False)


def of(row):
    return gpt(row["layers"], row["hidden"], row["heads"])


def mpt(row):
    return gpt(*MPT[row["Model"]], vocabulary=50_368, sequence=row["SeqLen (T)"])


@pytest.mark.parametrize("row", table("korthikanti_2022"), ids=lambda row: row["model"])
def test_mfu_of_korthikanti(row):
    utilisation = mfu(of(row), row["gpus"], row["batch"] / row["iteration_s"], A100.flops)
    assert 100 * utilisation == pytest.approx(row["mfu_pct"], abs=0.2)


@pytest.mark.parametrize("row", table("megatron_2021"), ids=lambda row: f"{row['parameters_g']} G")
def test_parameters_and_flops_of_megatron(row):
    model, s, v, batch = of(row), 2048, 51_200, row["batch"]
    layers, h = model.layers, model.hidden
    assert model.parameters / 1e9 == pytest.approx(row["parameters_g"], abs=0.06)
    formula = 12 * layers * h**2 * (1 + 13 / (12 * h) + (v + s) / (12 * layers * h))
    assert model.parameters == pytest.approx(formula, rel=1e-5)
    formula = 96 * batch * s * layers * h**2 * (1 + s / (6 * h) + v / (16 * layers * h))
    assert model.flops(batch, "full") == pytest.approx(formula, rel=1e-12)


def test_days_of_training_of_megatron():
    """As section 5.1 of the paper reckons: 34 days for GPT-3, 84 for a trillion parameters."""
    assert training_s(gpt(96, 12288, 96), 300e9, 1024, 140e12) / 86400 == pytest.approx(34, abs=0.5)
    assert training_s(gpt(128, 25600, 160), 450e9, 3072, 163e12) / 86400 == pytest.approx(84, abs=0.5)


def test_parameters_and_utilisation_of_mosaic():
    """Parameters to the last one. They count positions and biases as multiplications too, which `flops` doesn't."""
    for row in table("mosaic_fsdp"):
        model = mpt(row)
        assert model.parameters == row["NumParams"]
        matrices = model.layers * model.block_weights + model.embedding_parameters
        theirs = 1 + 6 * model.sequence * (model.parameters - matrices) / model.flops()
        peak = (H100 if "h100" in row["GPU"] else A100).flops * (2 if "FP8" in row["section"] else 1)
        rate = row["Throughput (T/s)"] / model.sequence
        assert 100 * theirs * mfu(model, row["# GPUs"], rate, peak) == pytest.approx(row["MFU"], abs=0.05)
        if row["Activation Checkpointing"] == "True":
            assert row["HFU"] == pytest.approx(row["MFU"] * 4 / 3, abs=0.02)
            ratio = hfu(model, row["# GPUs"], rate, peak=peak) / mfu(model, row["# GPUs"], rate, peak)
            assert ratio < 4 / 3  # theirs computes the output layer again too


def test_parameters_of_a_torch_model():
    from torch import nn

    model = gpt(2, 32, 4, vocabulary=100, sequence=16)
    block = nn.TransformerEncoderLayer(32, 4, dim_feedforward=128)
    module = nn.ModuleList([nn.Embedding(100, 32), nn.Embedding(16, 32), block, block, nn.LayerNorm(32)])
    inside = sum(weight.numel() for weight in block.parameters())
    assert model.block_parameters == inside
    assert model.parameters == sum(weight.numel() for weight in module.parameters()) + inside  # which is there twice


def test_llama_3():
    """8.03 G parameters, as its model card says, with 8 heads of keys and values."""
    model = Transformer(32, 4096, 32, 14336, 128_256, 8192, tied=False, kv_heads=8)
    assert model.parameters == 8_030_261_248


def test_activations_by_korthikanti():
    """Table 2 of the paper, at 8 ranks; they coincide at one."""
    model, sbh = gpt(96, 12288, 96), 2048 * 12288
    scores = 5 * 96 * 2048 / 12288
    assert model.activation_bytes(tp=8) == pytest.approx(sbh * (10 + 24 / 8 + scores / 8))
    assert model.activation_bytes(tp=8, sequence_parallel=True) == pytest.approx(sbh / 8 * (34 + scores))
    assert model.activation_bytes(tp=8, sequence_parallel=True, recompute="selective") == 34 * sbh / 8
    assert model.activation_bytes(3, 8, True, "full") == 6 * sbh
    assert model.activation_bytes() == model.activation_bytes(sequence_parallel=True) == sbh * (34 + scores)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: gpt(0, 32, 4), r"layers \(=0\) must be at least 1"),
        (lambda: gpt(2, 32, 5), r"hidden \(=32\) must be a multiple of heads \(=5\)"),
        (lambda: Transformer(2, 32, 4, 64, 100, 16, kv_heads=3), r"kv_heads \(=3\) must divide heads \(=4\)"),
        (
            lambda: gpt(2, 32, 4).flops(recompute="all"),
            r"recompute \(='all'\) must be one of None, 'selective', 'full'",
        ),
    ],
)
def test_what_is_no_transformer_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()
