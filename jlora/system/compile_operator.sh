#!/bin/sh
# Called as: sh compile_operator.sh PYTHON .../asm_tuner.py --cc_path=COMPILER FILE_op.cc FLAGS...
#
# Jittor compiles each operator through asm_tuner.py, which rewrites the assembly between the marks
# "@begin" and "@end" of the source. Few operators have such marks; starting Python for the others
# costs half as much as compiling them.
python=$1 tuner=$2 compiler=${3#--cc_path=} source=$4
shift 4
if [ -f "$source" ] && ! grep -q "@begin" "$source"; then
    exec "$compiler" "$source" "$@"
fi
exec "$python" "$tuner" "--cc_path=$compiler" "$source" "$@"
