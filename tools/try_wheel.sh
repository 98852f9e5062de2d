#!/usr/bin/env bash
# Builds the wheel, installs it into an empty environment outside the checkout, and runs it there.
#   tools/try_wheel.sh cpu,serve      on Linux
#   tools/try_wheel.sh serve          on a Mac
# Downloads all that the package needs. With uv at hand, `uv tool install` of the checkout is tried as well.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
extras=${1:-serve}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

git -C "$root" archive HEAD | (mkdir "$work/source" && tar -x -C "$work/source") # building leaves files behind
python3 -m pip --quiet wheel --no-deps --wheel-dir "$work/dist" "$work/source"
python3 -m venv "$work/empty"
"$work/empty/bin/pip" --quiet --disable-pip-version-check install "$(echo "$work"/dist/*.whl)[$extras]"

try() { # the folder of the command
  cd "$work"
  "$1/mtp-mlx" --version
  "$1/mtp-mlx" doctor
  "$1/mtp-mlx" generate --prompt "Why is the sky blue?" --max-tokens 20
}
try "$work/empty/bin"

if command -v uv >/dev/null; then
  export UV_TOOL_DIR=$work/tools UV_TOOL_BIN_DIR=$work/bin
  uv tool install --quiet "$work/source[$extras]"
  try "$work/bin"
fi
echo "the wheel works"
