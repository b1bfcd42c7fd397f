# Sourced by run_all.sh and run_tests.sh: afterwards `python` is one that has what pyproject.toml asks for.
#
# Which environment: CROSSPOOL_VENV (made if it is not there), else the one that is active, else .venv beside this
# repository. Nothing is downloaded once it is complete. A torch that suits (see pyproject.toml) is never replaced.
# Other switches: CROSSPOOL_PYTHON names the interpreter that a new environment is made with.

_cp_fail() { echo "error: $*" >&2; return 1; }

# The first interpreter of a supported version that really runs (a shim may not).
_cp_find_python() {
    local candidate
    for candidate in ${CROSSPOOL_PYTHON:-python3 python3.12 python3.11 python}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' >/dev/null 2>&1; then
            echo "$candidate"
            return 0
        fi
    done
    _cp_fail "no Python 3.11 or 3.12 found (tried ${CROSSPOOL_PYTHON:-python3, python3.12, python3.11, python});" \
        "install one or name it in CROSSPOOL_PYTHON"
}

# Is torch, of a version that pyproject.toml accepts, there for this interpreter?
_cp_has_torch() {
    local missing
    missing=$("$1" "$_cp_root/scripts/environment.py" missing 2>/dev/null) || return 1
    ! grep -q '^torch[<>=]' <<<"$missing"
}

_cp_make_venv() {
    local base flags=()
    base=$(_cp_find_python) || return 1
    # A virtual environment's own packages would not be seen from one made on top of it.
    if "$base" -c 'import sys; sys.exit(sys.prefix != sys.base_prefix)' && _cp_has_torch "$base"; then
        flags=(--system-site-packages)
    fi
    echo "Making a virtual environment in $1 with $("$base" --version)${flags[*]:+, on top of its torch}"
    if ! "$base" -m venv "${flags[@]}" "$1" >>"$_cp_log" 2>&1; then
        _cp_fail "$base -m venv $1 failed (on Debian and Ubuntu: install python3-venv); see $_cp_log"
        return 1
    fi
    [ -n "${flags[*]}" ] || touch "$1/.crosspool-own"
}

_cp_pip() {
    if ! python -m pip install --quiet --disable-pip-version-check --no-input "$@" >>"$_cp_log" 2>&1; then
        _cp_fail "pip failed: $(grep -i '^ *error' "$_cp_log" | head -n 1 | tr -s ' ' | cut -c1-200) (see $_cp_log)"
    fi
}

_cp_install() {
    local own=() missing free_kib
    [ -e "$_cp_prefix/.crosspool-own" ] && own=(--own)
    free_kib=$(df -Pk "$_cp_prefix" | awk 'NR==2 {print $4}')
    if [ "${free_kib:-0}" -lt 3000000 ]; then
        _cp_fail "$_cp_prefix has $((free_kib / 1000)) MB free and the packages need 3000 MB (6000 MB where torch brings" \
            "CUDA libraries); free some, or name another place in CROSSPOOL_VENV"
        return 1
    fi
    if ! python -m pip --version >/dev/null 2>&1 && ! python -m ensurepip >>"$_cp_log" 2>&1; then
        _cp_fail "the Python in $_cp_prefix has no pip and ensurepip failed; see $_cp_log"
        return 1
    fi
    # torch first and pinned, so that nothing later can bring a newer one; then Triton stays as torch chose it.
    if ! _cp_has_torch python; then
        echo "Installing torch (the largest part, minutes on a slow line; log: $_cp_log)"
        python "$_cp_root/scripts/environment.py" constraints "${own[@]}" | grep -v '^triton==' >"$_cp_constraints"
        _cp_pip "$(python "$_cp_root/scripts/environment.py" pin torch)" -c "$_cp_constraints" || return 1
    fi
    missing=$(python "$_cp_root/scripts/environment.py" missing $_cp_extras) || return 1
    if [ -n "$missing" ]; then
        echo "Installing $(echo "$missing" | wc -l) more packages"
        python "$_cp_root/scripts/environment.py" constraints "${own[@]}" >"$_cp_constraints" || return 1
        echo "$missing" >"$_cp_constraints.wanted"
        _cp_pip -r "$_cp_constraints.wanted" -c "$_cp_constraints" || return 1
    fi
    missing=$(python "$_cp_root/scripts/environment.py" missing $_cp_extras | tr '\n' ' ')
    [ -z "${missing// /}" ] || { _cp_fail "still missing after the installation: $missing"; return 1; }
}

_cp_activate() {
    if [ -n "${CROSSPOOL_VENV:-}" ]; then
        _cp_prefix=$CROSSPOOL_VENV
    elif [ -n "${VIRTUAL_ENV:-}" ] && [ -x "$VIRTUAL_ENV/bin/python" ]; then
        _cp_prefix=$VIRTUAL_ENV
    elif [ "${CONDA_DEFAULT_ENV:-base}" != base ] && [ -x "${CONDA_PREFIX:-}/bin/python" ]; then
        _cp_prefix=$CONDA_PREFIX
    else
        _cp_prefix=$_cp_root/.venv
    fi
    if [ ! -x "$_cp_prefix/bin/python" ]; then _cp_make_venv "$_cp_prefix" || return 1; fi
    export PATH="$_cp_prefix/bin:$PATH"
    if [ -e "$_cp_prefix/pyvenv.cfg" ]; then export VIRTUAL_ENV=$_cp_prefix; fi
    if ! python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then
        _cp_fail "$_cp_prefix has $(python --version 2>&1) and Python 3.11 or 3.12 is needed"
        return 1
    fi
}

_cp_setup() {
    local stamp want
    mkdir -p "$_cp_root/.cache" || { _cp_fail "$_cp_root cannot be written"; return 1; }
    _cp_log=$_cp_root/.cache/setup.log
    _cp_constraints=$_cp_root/.cache/constraints.$$
    if command -v flock >/dev/null; then exec 9>"$_cp_root/.cache/setup.lock"; flock 9; fi
    _cp_activate || return 1
    _cp_extras=$(command -v nvidia-smi >/dev/null && echo cuda)
    stamp=$_cp_prefix/.crosspool-stamp
    want=$(cat "$_cp_root/pyproject.toml" "$_cp_root/constraints.txt" | cksum)" $_cp_extras"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
        if [ -n "$(python "$_cp_root/scripts/environment.py" missing $_cp_extras || echo unknown)" ]; then
            : >"$_cp_log"
            _cp_install || return 1
        fi
        { echo "$want" >"$stamp"; } 2>/dev/null || true
    fi
    rm -f "$_cp_constraints" "$_cp_constraints.wanted"
    if command -v flock >/dev/null; then exec 9>&-; fi
}

_cp_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
_cp_setup
