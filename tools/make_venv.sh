#!/bin/sh
# Makes the virtual environment that is named, with the first Python found that can. One that works is left alone.
set -eu
venv=$1
usable='import sys; sys.exit(sys.version_info < (3, 11))'

if "$venv/bin/python" -c "$usable" 2> /dev/null && "$venv/bin/python" -m pip --version > /dev/null 2>&1; then
  exit 0
fi
reason="No Python 3.11 or later was found. Install one, and try again."
for python in python3.11 python3.12 python3.13 python3 python3.14 python; do
  "$python" -c "$usable" 2> /dev/null || continue
  if "$python" -m venv --clear "$venv" > /dev/null 2>&1; then
    exit 0
  fi
  reason="$python cannot make a virtual environment. On Debian and Ubuntu: apt-get install ${python}-venv"
done
echo "$reason" >&2
exit 1
