"""The studies of docs/results on CIFAR-10, from images to tables and plots.

    python benchmarks/cifar10/run.py main-training --data "data.name=parquet data.path=cifar10-jpeg" \
        --classifiers cifar10-classifiers --out runs/cifar10 --workers 2
    python benchmarks/cifar10/run.py post-training ...
    python benchmarks/cifar10/run.py pipelines --pipeline FOLDER ...    # of train_pipeline.py
    python benchmarks/cifar10/run.py main-training ... --draw    # only tables and plots, of what is there

They take hours on two cores; the same call continues. ``--classifiers`` holds resnet20, 32, 44 and 56.safetensors of
akamaster/pytorch_resnet_cifar10. ResNet-20 guides training (perceptual term, discriminator's backbone; ResNet-32 too in
the Frechet term). ResNet-56 evaluates, ResNet-44 and a small classifier that is trained here give second opinions.
"""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "ROBUSTOK_PROGRESS": "0"}  # a core for each job

import argparse
from pathlib import Path

import jobs
import main_training
import pipelines
from figures import best_sigmas, draw_main_training, draw_pipelines, draw_post_training
from setting import Setting

import post_training


def main() -> None:
    """Read the arguments, run the jobs, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("main-training", "post-training", "pipelines"))
    parser.add_argument("--data", required=True, help="words that name CIFAR-10, as for robustok main-train")
    parser.add_argument("--classifiers", type=Path, required=True, help="folder with resnet20, 32, 44, 56.safetensors")
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--workers", type=int, default=2, help="jobs at once, each on one core")
    parser.add_argument("--pipeline", type=Path, help="folder of the pipeline of train_pipeline.py, for pipelines")
    parser.add_argument("--draw", action="store_true", help="run nothing; tables and plots of what is there")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    setting = Setting(tuple(arguments.data.split()), arguments.classifiers.resolve(), out)
    post = arguments.study == "post-training"
    if arguments.study == "pipelines":
        if not arguments.draw:
            jobs.run([*pipelines.jobs(setting, str(arguments.pipeline.resolve()))], out, arguments.workers)
        draw_pipelines(out)
        return
    if not arguments.draw:
        study = post_training if post else main_training
        jobs.run([*dict.fromkeys(study.jobs(setting))], out, arguments.workers)
        if post:
            jobs.run([*dict.fromkeys(post_training.last_jobs(setting, best_sigmas(out)))], out, arguments.workers)
    (draw_post_training if post else draw_main_training)(out)


if __name__ == "__main__":
    main()
