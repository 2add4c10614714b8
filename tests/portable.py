"""The plain tests as other processors and other habits would run them: `make test-portable [ONLY="avx2 openblas"]`.

Torch and its libraries choose their kernels, and so the order of their sums, by the processor and the number of
threads; tests that pass only beside their neighbours pass by luck. A way that this processor has not (AVX-512 on an
older one) runs as the next lower one; the table at the end says what torch took.
"""

import os
import subprocess
import sys
import time

LIBRARY_CHOOSES = {"OPENBLAS_CORETYPE": None, "OPENBLAS_L2_SIZE": None}
WAYS = {
    "native": ({}, []),
    "no-vectors": ({"ATEN_CPU_CAPABILITY": "default"}, []),
    "avx2": ({"ATEN_CPU_CAPABILITY": "avx2"}, []),
    "avx512": ({"ATEN_CPU_CAPABILITY": "avx512"}, []),
    "onednn-sse4.1": ({"ONEDNN_MAX_CPU_ISA": "SSE41"}, []),
    "openblas": (LIBRARY_CHOOSES, []),
    "2-threads": ({"OMP_NUM_THREADS": "2"}, []),
    "4-threads": ({"OMP_NUM_THREADS": "4"}, []),
    "shuffled-1": ({}, ["--random-order", "--random-order-seed=1"]),
    "shuffled-2": ({"ATEN_CPU_CAPABILITY": "default"}, ["--random-order", "--random-order-seed=2"]),
    "shuffled-3": ({"ATEN_CPU_CAPABILITY": "avx2"}, ["--random-order", "--random-order-seed=3"]),
}
"""Name -> variables (None: not set), and options of pytest."""
MAIN = ("native", "no-vectors", "avx2", "2-threads", "shuffled-1")
CAPABILITY = "import torch; print(torch.backends.cpu.get_cpu_capability())"


def run(name, options):
    """The name of a way, what torch made of it, how it ended, and how long it took."""
    variables, own = WAYS[name]
    given = os.environ | {key: value for key, value in variables.items() if value is not None}
    given = {key: value for key, value in given.items() if variables.get(key, value) is not None}
    told = subprocess.run([sys.executable, "-c", CAPABILITY], env=given, capture_output=True, text=True, check=True)
    start = time.monotonic()
    # Shapes are checked by `make test`; here numbers are what may differ.
    command = [sys.executable, "-m", "pytest", "-n", "2", *own, *options]
    code = subprocess.run(command, env=given | {"JAXTYPING_DISABLE": "1"}, check=False).returncode
    return name, told.stdout.strip(), "passed" if code == 0 else f"FAILED ({code})", time.monotonic() - start


def main(names, options):
    """Run these ways (by default the main ones), say which ran and how; exit code 1 where one failed."""
    unknown = sorted(set(names) - set(WAYS))
    if unknown:
        sys.exit(f"No way is called {unknown}; there are: {', '.join(WAYS)}.")
    rows = [run(name, options) for name in names or MAIN]
    for name, capability, ended, seconds in rows:
        print(f"{name:<15}{capability:<10}{ended:<12}{seconds:>6.0f} s")
    sys.exit(any(ended != "passed" for _, _, ended, _ in rows))


if __name__ == "__main__":
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    main(sys.argv[1:split], sys.argv[split + 1 :])
