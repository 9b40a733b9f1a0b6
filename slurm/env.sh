# The settings of the site. Every job script sources this file, as ${ECAR_SLURM:-slurm}/env.sh from the folder in which
# sbatch was called. It contains no hyperparameters. It defines for the job scripts:
#
#   ${BIN}          prefix of a command's name:                   "${BIN}ecar-dist"  "${BIN}ecar-data"  "${BIN}python"
#   "${SRUN[@]}"    srun, with its options for the container if there is one; further options follow, then
#   "${INSIDE[@]}"  the command that starts the container, if it needs one, before the command to run:
#                       "${SRUN[@]}" --ntasks=1 "${INSIDE[@]}" "${BIN}ecar-data" encode ...
#   here COMMAND    run a command on this node only, in the container if there is one
#   say TEXT        print a line with the time to the log of the job
#   die TEXT        print the same to stderr and end the script with status 1: a person must fix something

# module load cuda/13.0                        # if the site keeps its software in modules
# export NCCL_SOCKET_IFNAME=ib0                # if NCCL picks the wrong network
# export NCCL_DEBUG=WARN
# PYXIS_IMAGE=/images/ecar.sqsh                # a container by pyxis and enroot
# APPTAINER_IMAGE=/images/ecar.sif             # or by apptainer; set at most one of the two
#   An image also keeps imports, 37,000 file operations a rank, off the shared file system: docs/scale.md
# MOUNTS=$PWD,/data                            # folders of the host that are mounted at the same path
# IMAGE_VENV=/opt/venv                         # environment in the image, if ecar-dist is not on its PATH

say() { echo "$(date +%T) $*"; }
die() { say "$*" >&2; exit 1; }

for name in VENV IMAGE_VENV PYXIS_IMAGE APPTAINER_IMAGE MOUNTS PWD; do
    [[ ${!name:-} != *[[:cntrl:]]* ]] || die "$name has a newline or another control character; remove it"
done

SRUN=(srun)
INSIDE=()
# The folder of the job without symbolic links, as `ecar-dist submit` and Slurm name it. $PWD may have symbolic links. A
# container that mounts one of the two names mounts the other, too.
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
    if [ -n "${PYXIS_IMAGE:-}" ]; then  # pyxis is a plugin of srun: without srun there is no container
        "${SRUN[@]}" --nodes=1 --ntasks=1 --ntasks-per-node=1 "$@"
    else
        "${INSIDE[@]}" "$@"
    fi
}
