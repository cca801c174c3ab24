#!/bin/sh
# Print the path of a Python that can make the project's environment: 3.11 or newer, with venv and ensurepip.
# $PYTHON, where set, is the only candidate. Each one is run, because a name on PATH may be a shim without a Python.

minimum='3.11'
check='import sys
if sys.version_info < (3, 11): sys.exit(3)
try:
    import ensurepip, venv
except ImportError:
    sys.exit(4)
print(sys.executable)'

too_old=''
without_pip=''
for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3.14 python3 python}; do
    found=$("$candidate" -c "$check" 2>/dev/null)
    case $? in
        0)
            printf '%s\n' "$found"
            exit 0
            ;;
        3) too_old="$too_old $candidate" ;;
        4) without_pip="$without_pip $candidate" ;;
    esac
done

if [ -n "$without_pip" ]; then
    echo "error:$without_pip: this Python cannot make virtual environments (no ensurepip or venv)." >&2
    echo "       Install that part of it (Debian, Ubuntu: apt install python3-venv), or name another: make PYTHON=/path/to/python3" >&2
elif [ -n "$too_old" ]; then
    echo "error: Python $minimum or newer is needed;$too_old is older. Name another: make PYTHON=/path/to/python3" >&2
else
    echo "error: no Python found (tried ${PYTHON:-python3.11 python3.12 python3.13 python3.14 python3 python})." >&2
    echo "       Install Python $minimum or newer, or name one: make PYTHON=/path/to/python3" >&2
fi
exit 1
