#!/bin/sh
# Takes the place of TGI's entry point; the arguments are those of text-generation-launcher.
# SageMaker's names are understood too, and the port that it wants.
ldconfig 2>/dev/null || echo "the cache of shared libraries could not be refreshed, which seldom matters"
. /usr/src/.venv/bin/activate
[ -n "${HF_MODEL_ID}" ] && export MODEL_ID="${MODEL_ID:-${HF_MODEL_ID}}"
[ -n "${HF_MODEL_REVISION}" ] && export REVISION="${REVISION:-${HF_MODEL_REVISION}}"
[ -n "${HF_MODEL_QUANTIZE}" ] && export QUANTIZE="${QUANTIZE:-${HF_MODEL_QUANTIZE}}"
[ -n "${SM_NUM_GPUS}" ] && export NUM_SHARD="${NUM_SHARD:-${SM_NUM_GPUS}}" PORT=8080
exec /opt/preft/bin/python -P -m tgi_patch serve -- "$@"
