#!/bin/sh
# Prints the requirements file for this machine's GPU; says on stderr what it saw. Several GPUs: the oldest decides.
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -n | head -n 1)
case "$capability" in
[0-9]*.[0-9]*)
    if [ "$(printf '%s\n7.5\n' "$capability" | sort -n | head -n 1)" = 7.5 ]; then
        file=requirements.txt
    else
        file=requirements-v100.txt
    fi
    echo "NVIDIA GPU of compute capability $capability: installing $file" >&2
    ;;
*)
    file=requirements-cpu.txt
    echo "no NVIDIA GPU (nvidia-smi names none): installing $file" >&2
    ;;
esac
echo "$file"
