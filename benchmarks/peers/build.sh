#!/bin/sh
# Builds llama.cpp for this machine's CPU, from llama-cpp-python's source package, into a virtual environment of its own.
#
#     sh benchmarks/peers/build.sh ~/peers-venv
#
# The environment also gets the packages that to_gguf.py needs. About ten minutes with one job (JOBS=n for more).
set -eu

llama_cpp_python=0.3.36
gguf=0.19.0
numpy=2.4.6

if [ $# -ne 1 ]; then
    echo "usage: sh $0 VENV" >&2
    exit 2
fi
venv=$1

[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/pip" install --quiet "gguf==$gguf" "numpy==$numpy"
CMAKE_ARGS="-DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" \
CMAKE_BUILD_PARALLEL_LEVEL=${JOBS:-1} \
    nice -n 19 "$venv/bin/pip" install --no-binary llama-cpp-python "llama-cpp-python==$llama_cpp_python"
"$venv/bin/python" -c 'import llama_cpp; print(llama_cpp.__version__, llama_cpp.llama_print_system_info().decode())'
