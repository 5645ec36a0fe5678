# To be sourced by the scripts beside the README: enters .venv, and makes it first where it is not there or the pins
# have changed since. LSLORA_VENV names another folder for it.
venv=${LSLORA_VENV:-.venv}
stamp=$venv/.installed
if ! cmp -s constraints.txt "$stamp" 2>/dev/null; then
    echo "Setting up $venv with the versions of constraints.txt (once)"
    rm -f "$stamp"
    "${PYTHON:-python3}" -m venv "$venv"
    # torch first and alone: on a machine with its own build of it, nothing else may pull in another.
    "$venv/bin/python" -m pip install --quiet --constraint constraints.txt torch
    "$venv/bin/python" -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
    cp constraints.txt "$stamp"
fi
source "$venv/bin/activate"
