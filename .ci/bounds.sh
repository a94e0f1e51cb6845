#!/usr/bin/env bash
# The tests with the oldest or the newest versions that pyproject.toml allows, in a fresh environment.
#   .ci/bounds.sh lowest|newest [pytest arguments]      PYTHON_VERSION is that of python3 by default; needs uv
set -euo pipefail
case "${1:-}" in
  lowest) resolution=lowest-direct ;;
  newest) resolution=highest ;;
  *) sed -n 2,3p "$0" >&2; exit 2 ;;
esac
shift
cd "$(dirname "$0")/.."
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
uv venv --quiet --python "${PYTHON_VERSION:-$(command -v python3)}" "$environment"
export UV_PYTHON="$environment/bin/python" OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
uv pip install --quiet --resolution "$resolution" -e ".[test]"
uv pip freeze | grep -iE '^(torch|transformers|diffusers|huggingface-hub|anndata|scanpy|spatialdata|squidpy|zarr|numpy|pandas|timm)=='
"$environment/bin/python" -m pytest -q -p no:cacheprovider "$@"
