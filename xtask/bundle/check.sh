#!/bin/sh
# Runs every correctness test and the recorded layers on the GPUs of this machine. Needs an NVIDIA driver and nothing else.
# Arguments go to the test programs: `check --skip many_tokens`. Exit code 0: all passed.
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd) || exit 1

gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU')
ranks=1
for candidate in 2 4 8; do
    if [ "$gpus" -ge "$candidate" ]; then ranks=$candidate; fi
done
failed=""
export FERROMOE_TEST_LAUNCHES=${FERROMOE_TEST_LAUNCHES:-10000}

for test in "$here"/tests/*; do
    name=$(basename "$test")
    echo "== test $name"
    FERROMOE_TEST_DEVICE=cuda "$test" --test-threads=1 "$@" || failed="$failed $name"
done

for fixture in "$here"/fixtures/*/; do
    name=$(basename "$fixture")
    echo "== ferromoe run, recorded layer $name on $ranks GPUs"
    "$here/ferromoe" run --checkpoint "$fixture" --input "$fixture/moe_io.safetensors" --ranks "$ranks" --device cuda ||
        failed="$failed run-$name"
done

if [ -n "$failed" ]; then
    echo "FAILED:$failed"
    exit 1
fi
echo "everything passed on $ranks of $gpus GPUs"
