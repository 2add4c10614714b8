"""Parity with the source libraries, measured; `python tests/parity.py` prints the table of every family and size."""

from __future__ import annotations

import sys

import torch
from families import CASES, Case, run
from helpers import randomise, relative
from torch import nn

from registerlens import HookedViT

TOLERANCE = 1e-5


def loaded(case: Case) -> tuple[nn.Module, HookedViT]:
    """A source model of the case with random weights, and ours made of it."""
    module = randomise(case.make(case.native))
    return module, HookedViT.from_module(module)


def errors_at(case: Case, module: nn.Module, vit: HookedViT, size: tuple[int, int]) -> dict[str, float]:
    """Relative errors of the stream around every block, the tokens, the output, and images run one by one."""
    images = torch.randn(3, vit.cfg.n_channels, *size, generator=torch.Generator().manual_seed(1))
    resized = module if size == case.native else case.resize(module, size)
    streams, tokens, output = run(case, resized, images, at_native=size == case.native)
    with torch.no_grad():
        got, cache = vit.run_with_cache(images, names_filter="blocks.*.hook_resid_*")
        got_tokens = vit(images, return_type="tokens")
        singles = torch.cat([vit(image[None]) for image in images])
    if len(streams) != vit.cfg.n_layers + 1:
        raise AssertionError(f"{len(streams)} streams for {vit.cfg.n_layers} blocks")
    pairs = {f"blocks.{i}.hook_resid_pre": stream for i, stream in enumerate(streams[:-1])}
    pairs |= {f"blocks.{i}.hook_resid_post": stream for i, stream in enumerate(streams[1:])}
    errors = {hook: relative(cache[hook], stream) for hook, stream in pairs.items()}
    errors |= {"tokens": relative(got_tokens, tokens), "output": relative(got, output)}
    return errors | {"singles": relative(singles, output)}


def main() -> int:
    """Print the table; 1 if a row does not hold."""
    failed = 0
    print(f"{'library':13}{'class':52}{'case':60}{'size':>12}{'largest relative error':>24}")
    for name, case in sorted(CASES.items(), key=lambda item: (item[1].library, item[1].source_class)):
        module, vit = loaded(case)
        for size in filter(None, (case.native, case.other)):
            worst = max(errors_at(case, module, vit, size).values())
            holds = worst <= TOLERANCE  # NaN does not
            failed += not holds
            mark = "" if holds else "  FAILS"
            print(f"{case.library:13}{case.source_class:52}{name:60}{'x'.join(map(str, size)):>12}{worst:24.1e}{mark}")
    print(f"{failed} rows fail" if failed else f"every row holds at {TOLERANCE:.0e}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
