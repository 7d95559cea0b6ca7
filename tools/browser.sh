#!/bin/sh
# Makes sure that there is a Chromium: one that is installed, the system's package, or what Playwright ($1) brings.
for name in chromium chromium-browser google-chrome google-chrome-stable; do
    command -v "$name" >/dev/null 2>&1 && exit 0
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    export DEBIAN_FRONTEND=noninteractive
    timeout 120 apt-get update -qq >/dev/null 2>&1
    timeout 300 apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null 2>&1 && exit 0
fi
timeout 300 "$1" install chromium >/dev/null 2>&1
