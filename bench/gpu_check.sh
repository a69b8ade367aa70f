#!/usr/bin/env bash
# Everything that only a GPU can show, with the Python of this machine and no network:
#   bench/gpu_check.sh OUTPUT_FOLDER [PART...]
# The most valuable first: the extension is built in place if there is none that this GPU can run (with CUTLASS where
# EPG_CUTLASS_DIR or the installed nvidia-cutlass has its headers), then correctness, then `epg-fast tune` for the jobs of
# the ladders, whose plans lie in OUTPUT_FOLDER/plans, ready to be shipped, then the ladders of sampling and training with
# those plans, the operations. Every part is bounded in time, and one that fails does not stop the next. PARTs choose
# some, e.g. for three calls of at most ten minutes each, the rest when there is more time:
#   bench/gpu_check.sh OUT build env sampling tune_heun
#   bench/gpu_check.sh OUT heun latency tune_onestep onestep
#   bench/gpu_check.sh OUT tune_diffusion diffusion
# A tuning that is cut off goes on where it was.
# Parts that are complete in OUTPUT_FOLDER are not repeated, and ladders go on where they were cut short. What this machine
# lacks is left out, which is said. OUTPUT_FOLDER/README.md holds the tables; OUTPUT_FOLDER.tar.gz, which is renewed after
# each part, holds everything. Exits with 1 if a part failed. PYTHON chooses the interpreter.
set -u
parts="build env sampling tests training tune_heun tune_diffusion tune_onestep tune_pretrain tune_consistency tune_fp8 heun latency onestep diffusion pretrain consistency operations data resources"
out=$(mkdir -p "${1:?usage: bench/gpu_check.sh OUTPUT_FOLDER [PART...]}/logs" && cd "$1" && pwd) || exit 2
wanted=" ${*:2} "
for name in $wanted; do
  [[ " $parts " == *" $name "* ]] || { echo "part $name: wanted some of: $parts"; exit 2; }
done
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONPATH=.:kernels${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 EPG_FAST_PLANS="$out/plans"
failed=0

part() { # name, seconds, command...
  local name=$1 seconds=$2 code
  shift 2
  [[ $wanted != *[^\ ]* || $wanted == *" $name "* ]] || return 0
  if grep -qsx "$name" "$out/complete"; then
    echo "== $name: complete already"
    return 0
  fi
  echo "== $name"
  timeout --kill-after 20 "$seconds" "$@" >"$out/logs/$name.log" 2>&1
  code=$?
  tail -n 3 "$out/logs/$name.log"
  case $code in
    0) echo "$name" >>"$out/complete" ;;
    3) echo "$name was cut short: the same command goes on" ;;
    124) echo "$name was cut off after $seconds s; see logs/$name.log"; [[ $name == tune_* ]] || failed=1 ;;
    *) echo "$name failed with exit code $code, see logs/$name.log"; failed=1 ;;
  esac
  tar -czf "$out.tar.gz" -C "$(dirname "$out")" "$(basename "$out")"
}

has() { "$python" -c "import $1" 2>/dev/null; }

tests() { # name, seconds, tests...
  local name=$1 seconds=$2 workers=()
  shift 2
  if ! has pytest; then
    [[ $wanted != *[^\ ]* || $wanted == *" $name "* ]] && echo "== $name: left out, pytest is not installed"
    return 0
  fi
  has xdist && workers=(-n 8 --dist worksteal)
  part "$name" "$seconds" "$python" -m pytest -q "${workers[@]}" "$@"
}

bench() { # name, seconds
  part "$1" "$(($2 + 40))" "$python" -m bench --output "$out" --parts "$1" --seconds "$2"
}

tune() { # name, minutes, flags...
  local name=$1 minutes=$2
  shift 2
  part "tune_$name" "$((minutes * 60 + 240))" "$python" -m epg_fast tune --minutes "$minutes" --limit 150 "$@"
}

# With CUTLASS the build takes minutes of a GPU's time: a library built elsewhere, even with a CPU's torch, serves as well.
usable='from epg_fast.ops.extension import extension_has_cuda, extension_status, gpus_without_code
raise SystemExit(not (extension_status()[0] and extension_has_cuda()) or bool(gpus_without_code()))'
part build 500 sh -c '"$0" -c "$1" || exec "$0" setup.py build_ext --inplace' "$python" "$usable"
part env 60 "$python" -m epg_fast env
tests sampling 120 tests/test_gpu_sampling.py
tests tests 240 tests/ops tests/models tests/training/test_optimizer.py tests/data/test_prefetch.py tests/data/test_dali.py
# Compiles networks, which takes its time.
tests training 240 tests/test_gpu.py
sample="--job sample --precision bf16 --batch_size 64"
tune heun 4 $sample --model.preset epg_xl_16_256 --guidance 2.5
tune diffusion 4 --job finetune-diffusion --model.preset epg_xl_16_256 --batch_size 64 --gpus 1
tune onestep 2 $sample --model.preset epg_l_16_256 --sampler onestep
tune pretrain 3 --job pretrain --model.preset epg_xl_16_256 --batch_size 128 --gpus 1
tune consistency 3 --job finetune-consistency --model.preset epg_l_16_256 --batch_size 64 --gpus 1
tune fp8 3 $sample --precision fp8 --model.preset epg_xl_16_256 --guidance 2.5
bench heun 240
bench latency 90
bench onestep 90
bench diffusion 150
bench pretrain 120
bench consistency 120
bench operations 180
bench data 60
part resources 240 "$python" -m bench.resources --arch 90
exit $failed
