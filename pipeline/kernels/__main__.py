"""Build the native kernels now: `python -m pipeline.kernels`. Without a compiler it says so and is content."""

from __future__ import annotations

from pipeline.kernels import native


def main() -> None:
    reason = native.why_not()
    print("native kernels: ready" if reason is None else f"native kernels: none ({reason}); PyTorch's own ops are used")


if __name__ == "__main__":
    main()
