#!/usr/bin/env bash
# On a machine with a GPU, in an environment with q3mega and pytest: the operators' GPU tests (under
# compute-sanitizer where there is one) and benchmarks, into docs/benchmarks/<card>.md.
#
#     PYTHON=.venv/bin/python benchmarks/gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
card=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")')
if [ -z "$card" ]; then
  echo "benchmarks/gpu.sh: torch of $python sees no GPU" >&2
  exit 2
fi
"$python" -m q3mega doctor
"$python" -m pytest -m gpu tests/ops
if command -v compute-sanitizer > /dev/null; then
  compute-sanitizer --error-exitcode 1 "$python" -m pytest -m gpu tests/ops/test_cuda.py
fi
page="docs/benchmarks/$(echo "$card" | tr 'A-Z ' 'a-z-').md"
partial=$(mktemp)
{
  echo "# $card"
  echo
  echo "\`benchmarks/gpu.sh\`, of which \`python benchmarks/operators.py --device cuda\`:"
  echo
  "$python" benchmarks/operators.py --device cuda
  echo
  echo "\`python benchmarks/compiled.py\`:"
  echo
  "$python" benchmarks/compiled.py
} | tee "$partial"
mv "$partial" "$page"
echo "$page"
