#!/bin/sh
# Measures every shape on the GPUs of this machine, beside the same layers in PyTorch where python3 has it.
#
#   bench [SHAPE...]       all shapes unless some are named
#   RESULTS=FILE           where the JSON lines go; a new file in the current folder unless named
#   RANKS=R  TOKENS=LIST  ROUTING="balanced skewed one-expert"
#   EXPERTS="bf16 fp8"     number formats; both unless named
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd) || exit 1

gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')
ranks=1
for candidate in 2 4 8; do
    if [ "$gpus" -ge "$candidate" ]; then ranks=$candidate; fi
done
ranks=${RANKS:-$ranks}
results=${RESULTS:-bench-$(date +%Y%m%d-%H%M%S).jsonl}
if [ $# -eq 0 ]; then set -- flash pro v3 glm-5 glm-flash qwen3-30b gpt-oss-120b mixtral-8x7b; fi

# cuBLAS, for the rates of dense products, with cuBLASLt beside it: a system library, or the one that PyTorch brings.
if [ -z "$FERROMOE_CUBLAS" ]; then
    FERROMOE_CUBLAS=$(python3 -c '
import glob, sys
found = [path for folder in sys.path for path in glob.glob(folder + "/nvidia/*/lib/libcublas.so.1[23]")]
print(sorted(found)[-1] if found else "")' 2>/dev/null)
    if [ -n "$FERROMOE_CUBLAS" ]; then export FERROMOE_CUBLAS; else unset FERROMOE_CUBLAS; fi
fi
torch=no
if python3 -c 'import torch, numpy' 2>/dev/null; then torch=yes; else echo "python3 has no PyTorch: no baseline"; fi

failed=""
for shape in "$@"; do
    for experts in ${EXPERTS:-bf16 fp8}; do
        for routing in ${ROUTING:-balanced}; do
            set -- --shape "$shape" --experts "$experts" --ranks "$ranks" --routing "$routing" ${TOKENS:+--tokens "$TOKENS"} --json
            echo "== $shape, $experts, $routing, $ranks ranks"
            "$here/ferromoe" bench "$@" --device cuda >>"$results" || failed="$failed $shape-$experts-$routing"
            if [ $torch = yes ]; then
                python3 "$here/torch_baseline.py" "$@" >>"$results" || failed="$failed torch-$shape-$experts-$routing"
            fi
        done
    done
done

echo "== $results"
python3 "$here/torch_baseline.py" --table "$results" 2>/dev/null || cat "$results"
if [ -n "$failed" ]; then
    echo "FAILED:$failed"
    exit 1
fi
