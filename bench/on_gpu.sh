#!/usr/bin/env bash
# On a machine with a GPU that may have no network: installs r1, runs the GPU tests and every benchmark.
#   bench/on_gpu.sh [FOLDER_OF_WHEELS]
# Uses the machine's own torch. Wheels in the folder are installed as they are; what then still lacks is named.
# Results lie in ${OUT:-bench/results}: pytest.txt, and one JSON file a benchmark.
set -uo pipefail
cd "$(dirname "$0")/.."
wheels=${1:-wheels}
out=${OUT:-bench/results}
mkdir -p "$out"

if compgen -G "$wheels/*.whl" >/dev/null; then
  python -m pip install -q --no-index --no-deps "$wheels"/*.whl || exit 1
fi
python -m pip install -q --no-index --no-deps --no-build-isolation -e . || exit 1
python - <<'PY'
import torch, r1.kernels
print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")
try:
    import r1._cuda as cuda
    print("r1._cuda:", [cuda.device(i) for i in range(cuda.device_count())] or cuda.status())
except ImportError as error:
    print("r1._cuda was not built:", error)
PY

failed=0
OMP_NUM_THREADS=1 python -m pytest -m gpu tests 2>&1 | tee "$out/pytest.txt"
code=${PIPESTATUS[0]}
[ "$code" -eq 0 ] || [ "$code" -eq 5 ] || failed=1  # 5: there is no such test yet
for file in bench/[a-z]*.py; do
  case "$file" in bench/fp8_training.py | bench/static.py) continue ;; esac  # of which neither needs a GPU
  python -m "r1.bench.$(basename "$file" .py)" || failed=1
done
exit $failed
