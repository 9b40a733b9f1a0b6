# The site, in one place: every job script sources this file, as ${ECAR_SLURM:-slurm}/env.sh from the folder in which
# sbatch was called. It holds no hyper-parameters. What the job scripts find here:
#
#   ${BIN}          stands before a command's name:               "${BIN}ecar-dist"  "${BIN}ecar-data"  "${BIN}python"
#   "${SRUN[@]}"    srun, in the container if there is one; its options follow, then
#   "${INSIDE[@]}"  the container's other half, before the command:
#                       "${SRUN[@]}" --ntasks=1 "${INSIDE[@]}" "${BIN}ecar-data" encode ...
#   here COMMAND    runs a command on this node alone, in the container if there is one
#   say TEXT        a line with the time, for whoever reads the job's log
#   die TEXT        the same on stderr, and the end of the script: status 1, a person must fix something

# module load cuda/13.0                        # where the site keeps its software in modules
# export NCCL_SOCKET_IFNAME=ib0                # where NCCL picks the wrong network
# export NCCL_DEBUG=WARN
# PYXIS_IMAGE=/images/ecar.sqsh                # a container by pyxis and enroot
# APPTAINER_IMAGE=/images/ecar.sif             # or one by apptainer; one of the two at most
# MOUNTS=$PWD,/data                            # folders of the host that the container sees under the same path
# IMAGE_VENV=/opt/venv                         # where the image has ecar-dist, if it is not on its PATH there

say() { echo "$(date +%T) $*"; }
die() { say "$*" >&2; exit 1; }

for name in VENV IMAGE_VENV PYXIS_IMAGE APPTAINER_IMAGE MOUNTS PWD; do
    [[ ${!name:-} != *[[:cntrl:]]* ]] || die "$name has a newline or another control character; take it out"
done

SRUN=(srun)
INSIDE=()
# The folder of the job without symbolic links, as `ecar-dist submit` and Slurm name it in all that they pass on; $PWD may
# have some. A container that sees it under the one name sees it under the other, too.
FOLDER=$(pwd -P) MOUNTED=${MOUNTS:-$PWD}
[ "$PWD" = "$FOLDER" ] || [[ ,$MOUNTED, != *",$PWD,"* ]] || MOUNTED=$FOLDER,$MOUNTED
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"

if [ -n "${PYXIS_IMAGE:-}" ] && [ -n "${APPTAINER_IMAGE:-}" ]; then
    die "PYXIS_IMAGE and APPTAINER_IMAGE are both set; unset one of them"
elif [ -n "${PYXIS_IMAGE:-}" ]; then
    VENV=${IMAGE_VENV:-}
    SRUN+=("--container-image=$PYXIS_IMAGE" "--container-workdir=$FOLDER")
    SRUN+=("--container-mounts=$(sed 's/[^,][^,]*/&:&/g' <<< "$MOUNTED")")
elif [ -n "${APPTAINER_IMAGE:-}" ]; then
    VENV=${IMAGE_VENV:-}
    INSIDE=(apptainer exec --nv --bind "$MOUNTED" --pwd "$FOLDER" "$APPTAINER_IMAGE")
else
    VENV=$(realpath -m -s "${VENV:-.venv}")
    [ -x "$VENV/bin/ecar-dist" ] || die "no $VENV/bin/ecar-dist; run make install, or set VENV to the environment"
    export PATH="$VENV/bin:$PATH"
fi
BIN=${VENV:+$VENV/bin/}

here() {
    if [ -n "${PYXIS_IMAGE:-}" ]; then  # pyxis is a plugin of srun: without a step there is no container
        "${SRUN[@]}" --nodes=1 --ntasks=1 --ntasks-per-node=1 "$@"
    else
        "${INSIDE[@]}" "$@"
    fi
}
