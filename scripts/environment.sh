# To be sourced with an extra of pyproject.toml (train or dev) by the scripts beside the README: enters .venv, and
# installs what the extra needs where it is not there yet or the pins have changed. LSLORA_VENV names another folder.
extra=$1
venv=${LSLORA_VENV:-.venv}
stamp=$venv/.installed-$extra
if ! cmp -s constraints.txt "$stamp"; then
    echo "Setting up $venv for '$extra' with the versions of constraints.txt (once)"
    [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
    # torch first and alone: on a machine with its own build of it, nothing else may pull in another.
    "$venv/bin/python" -m pip install --quiet --constraint constraints.txt torch
    "$venv/bin/python" -m pip install --quiet --constraint constraints.txt --editable ".[$extra]"
    cp constraints.txt "$stamp"
fi
source "$venv/bin/activate"
