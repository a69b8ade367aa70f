#!/usr/bin/env bash
# Everything that only a GPU can show, with the Python of this machine and no network:
#   bench/gpu_check.sh OUTPUT_FOLDER
# Builds the extension in place, then runs the GPU tests and the microbenchmarks; every part is bounded in time, and a
# part that fails does not stop the next. Exits with 1 if one failed. PYTHON chooses the interpreter.
set -u
out=$(mkdir -p "${1:?usage: bench/gpu_check.sh OUTPUT_FOLDER}" && cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONPATH=.:kernels${PYTHONPATH:+:$PYTHONPATH}
failed=0

part() { # name, seconds, command...
  local name=$1 seconds=$2
  shift 2
  echo "== $name"
  timeout "$seconds" "$@" >"$out/$name.log" 2>&1
  local code=$?
  tail -n 3 "$out/$name.log"
  if [ $code -ne 0 ]; then
    echo "$name failed with exit code $code, see $out/$name.log"
    failed=1
  fi
}

part build 120 "$python" setup.py build_ext --inplace
part env 60 "$python" -m epg_fast env
part gpu 30 "$python" -c "import torch; print(torch.cuda.get_device_name(), torch.version.cuda)"
part tests 240 "$python" -m pytest -q -m gpu tests
part bench 240 "$python" -m pytest -q bench/ops --benchmark-only --benchmark-json "$out/bench_ops.json"
exit $failed
