#!/bin/sh
# Replaces TGI's entry point. The arguments are those of text-generation-launcher.
ldconfig 2>/dev/null || echo "ldconfig failed: the cache of shared libraries is not refreshed, which rarely matters"
. /usr/src/.venv/bin/activate
if [ "${1:-}" = serve ]; then
    # SageMaker runs `IMAGE serve`: the same variables and port as TGI's SageMaker image, and no further arguments
    if [ -z "${HF_MODEL_ID:-}" ]; then
        echo "preft: HF_MODEL_ID is not set: set it to the model that SageMaker serves" >&2
        exit 1
    fi
    export MODEL_ID="${HF_MODEL_ID}"
    [ -z "${HF_MODEL_REVISION:-}" ] || export REVISION="${HF_MODEL_REVISION}"
    [ -z "${SM_NUM_GPUS:-}" ] || export NUM_SHARD="${SM_NUM_GPUS}"
    [ -z "${HF_MODEL_QUANTIZE:-}" ] || export QUANTIZE="${HF_MODEL_QUANTIZE}"
    [ -z "${HF_MODEL_TRUST_REMOTE_CODE:-}" ] || export TRUST_REMOTE_CODE="${HF_MODEL_TRUST_REMOTE_CODE}"
    set -- --port 8080
fi
exec /opt/preft/bin/python -P -m tgi_patch serve -- "$@"
