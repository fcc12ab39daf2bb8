#!/bin/sh
# Sees to the headers of GMP: fastecdsa, which py-libp2p pins, has no wheel and is compiled with them. Root gets them by
# apt-get; anybody else is told what to do.
set -eu
venv=$1

"$venv/bin/python" -c "import fastecdsa" 2> /dev/null && exit 0
echo '#include <gmp.h>' | "${CC:-cc}" -E - > /dev/null 2>&1 && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
  apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends libgmp-dev
  exit 0
fi
echo "The headers of GMP are missing. On Debian and Ubuntu: apt-get install libgmp-dev. On Fedora: dnf install gmp-devel." >&2
exit 1
