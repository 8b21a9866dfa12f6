#!/bin/bash
# Runs the probes and our kernels under racecheck, from the repository's root. Prints what each gives, without stacks.
export PYTHONPATH=$PWD
check() { compute-sanitizer --tool racecheck "$@" 2>&1 | grep -E "HAND|right|WRONG|done|Race|and Write|SUMMARY"; }
for hand in 1 2 3; do
  nvcc -arch=sm_90 -DHAND=$hand -o /tmp/handoff$hand benchmarks/racecheck/handoff.cu
  check /tmp/handoff$hand
done
check python3 benchmarks/racecheck/roles.py
check python3 benchmarks/racecheck/roles.py barred
for form in "stream 8" "quantize 1" "hopper 8" "hopper 64" "hopper 256" "dx 32" "dx 128"; do
  # shellcheck disable=SC2086
  check python3 benchmarks/racecheck/real.py $form
done
