#!/usr/bin/env bash
# Everything that only a GPU can show, with the Python of this machine and no network:
#   bench/gpu_check.sh OUTPUT_FOLDER [PART...]
# Builds the extension in place if there is none that this GPU can run (with CUTLASS where EPG_CUTLASS_DIR or the installed
# nvidia-cutlass has its headers), then runs the kernels' and the GPU tests and the microbenchmarks, first at the shapes of
# EPG-XL, then at all; every part is bounded in time, and a part that fails does not stop the next. Exits with 1 if one
# failed. PARTs (build, env, gpu, tests, training, bench_main, data, bench) choose some. PYTHON chooses the interpreter.
set -u
out=$(mkdir -p "${1:?usage: bench/gpu_check.sh OUTPUT_FOLDER [PART...]}" && cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONPATH=.:kernels${PYTHONPATH:+:$PYTHONPATH}
wanted=" ${*:2} "
failed=0

part() { # name, seconds, command...
  local name=$1 seconds=$2
  shift 2
  [[ $wanted != *[^\ ]* || $wanted == *" $name "* ]] || return 0
  echo "== $name"
  timeout "$seconds" "$@" >"$out/$name.log" 2>&1
  local code=$?
  tail -n 3 "$out/$name.log"
  if [ $code -ne 0 ]; then
    echo "$name failed with exit code $code, see $out/$name.log"
    failed=1
  fi
}

# With CUTLASS the build takes minutes of a GPU's time: a library built elsewhere, even with a CPU's torch, serves as well.
usable='from epg_fast.ops.extension import extension_has_cuda, extension_status, gpus_without_code
raise SystemExit(not (extension_status()[0] and extension_has_cuda()) or bool(gpus_without_code()))'
part build 500 sh -c '"$0" -c "$1" || exec "$0" setup.py build_ext --inplace' "$python" "$usable"
part env 60 "$python" -m epg_fast env
part gpu 30 "$python" -c "import torch; print(torch.cuda.get_device_name(), torch.version.cuda)"
part tests 300 "$python" -m pytest -q -n 8 --dist worksteal tests/ops tests/models tests/training/test_optimizer.py \
  tests/data/test_prefetch.py tests/data/test_dali.py
# Compiles networks, which takes its time.
part training 300 "$python" -m pytest -q -n 8 --dist worksteal tests/test_gpu.py
part bench_main 300 "$python" -m pytest -q bench/ops --benchmark-only --main-shapes \
  --benchmark-json "$out/bench_ops_main.json"
part data 120 sh -c 'if "$0" -c "import nvidia.dali"; then exec "$0" -m bench.bench_data --device cuda --readers 4 --output "$1"
  else echo "NVIDIA DALI is not installed: the loaders were not timed"; fi' "$python" "$out/bench_data.json"
part bench 300 "$python" -m pytest -q bench/ops --benchmark-only --benchmark-json "$out/bench_ops.json"
exit $failed
