"""Floor times of the operators on an H100 at Qwen3's shapes: arithmetic alone, nothing is run.

    python benchmarks/roofline.py > docs/benchmarks/roofline.md

Products at 800 TFLOP/s, what the best bf16 GEMMs reach on that card, and memory at 3.0 TB/s.
"""

from collections.abc import Iterator

from q3mega.model.sizes import QWEN3, Qwen3Shape

TFLOPS, TBS = 800.0, 3.0
MODELS = ("qwen3-0.6b", "qwen3-8b", "qwen3-32b", "qwen3-235b-a22b")
LENGTHS = (32_768, 131_072, 262_144)
TOKENS = (8192, 32_768)


def ms(flops: float) -> str:
    return f"{flops / TFLOPS / 1e9:.1f}"


def attention(shape: Qwen3Shape) -> Iterator[list[str]]:
    for s in LENGTHS:
        width = shape.heads * shape.head_dim
        forward = 2 * s * s * width  # two products, causal
        moved = 2 * 2 * s * shape.head_dim * (shape.heads + shape.kv_heads) + 4 * s * shape.heads
        cache = 2 * 2 * s * shape.kv_heads * shape.head_dim
        yield [
            f"{s:,}", f"{forward / 1e12:.1f}", ms(forward), ms(2.5 * forward), ms(3.5 * forward),
            f"{moved / TBS / 1e9:.2f}", f"{cache / 1e6:.0f}", f"{cache / TBS / 1e6:.0f}",
        ]  # fmt: skip


def losses(shape: Qwen3Shape) -> Iterator[list[str]]:
    for n in TOKENS:
        unit = 2 * n * shape.vocab * shape.hidden
        yield [
            f"{n:,}", f"{unit / 1e12:.1f}", ms(unit), ms(3 * unit), ms(4 * unit), ms(4 * unit),
            f"{2 * n * shape.vocab / 1e9:.1f}", f"{4 * n * shape.vocab / 1e9:.1f}",
        ]  # fmt: skip


def table(head: list[str], rows: Iterator[list[str]]) -> None:
    print("|", " | ".join(head), "|")
    print("|" + "---|" * len(head))
    for row in rows:
        print("|", " | ".join(row), "|")


def main() -> None:
    print(
        f"# Floors on an H100\n\n`python benchmarks/roofline.py`: products at {TFLOPS:.0f} TFLOP/s"
    )
    print(f"(bf16), memory at {TBS} TB/s. Arithmetic; nothing here was measured.\n")
    print(
        "## Attention, a layer, one causal sequence (plain or dual-chunk: the products are as many)"
    )
    print("\nms; the backward with 5 products, and with the 7 of the kernels without atomics.\n")
    table(
        ["model", "S", "TFLOP", "forward", "backward, 5", "backward, 7", "forward's memory",
         "KV MB", "one token's decode, µs"],
        ([name, *row] for name in MODELS for row in attention(QWEN3[name])),
    )  # fmt: skip
    print(
        "\n## Losses over the vocabulary (151,936), U = 2 N V H FLOPs\n\nms; GB of one copy of the"
    )
    print("logits, which is never made.\n")
    table(
        ["model", "N", "TFLOP a U", "log-probability, U", "GRPO, gradient in the forward, 3 U",
         "recompute, 4 U", "distillation, 4 U", "bf16 logits", "fp32 logits"],
        ([name, *row] for name in MODELS for row in losses(QWEN3[name])),
    )  # fmt: skip


if __name__ == "__main__":
    main()
