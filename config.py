"""The default of every setting, with its meaning and unit.

All but SAMPLE_BATCH and EVAL_SAMPLES, which are the defaults of other flags, are also flags: BATCH_SIZE is
--batch_size.

The annotation is the type of the flag and the comment is its help text. What a value must be, which scripts use it and
whether a resumed run may change it is in src/utils/settings.py.
"""

# Data
DATASET: str = "fashion-mnist"  # the data set; folder = your own images in DATA_PATH
VAL_SIZE: int = 2000  # training images held out for the validation loss; without the flag, a tenth at most
IMAGE_SIZE: int = 32  # height and width in pixels; 28×28 images are padded with black, those of a folder are resized
CHANNELS: int = 1  # 1 = grayscale, 3 = colour; cifar10 and folder have 3 by default

# Training
BATCH_SIZE: int = 64  # images per batch, over all processes; in training without the flag, less if there are fewer
LEARNING_RATE: float = 2e-3  # peak learning rate of Adam
LR_WARMUP: int = 200  # optimiser steps of linear learning-rate warm-up; without the flag, a tenth of all at most
LR_DECAY: float = 1.0  # fraction of all steps, at the end, over which the learning rate falls linearly to 0; 0 = none
ACCUMULATE: int = 1  # gradient accumulation: parts into which a batch is divided to save memory
EPOCHS: int = 200  # passes over the training images
GRAD_CLIP: float = 1.0  # maximum norm of the gradient; larger gradients are scaled down to it
EMA_DECAY: float = 0.995  # decay rate of the moving average of the weights; higher averages over more steps
SEED: int = 0  # random seed of all noise; in training, also of the initial weights and the order of the data
PRECISION: str = "auto"  # arithmetic of the network; auto = bfloat16 where the device is fast in it, else float32
DROPOUT: float = 0.0  # dropout probability in every ResNet block
COMPILE: bool = False  # compile the network with torch.compile: faster steps after one or two minutes at the start

# U-Net
UNET_DIM: int = 32  # channels at full resolution
UNET_DIM_MULTS: list[int] = [1, 2, 4, 8]  # channels of each level, as multiples of UNET_DIM
ENCODER_ATTENTION: bool = True  # self-attention at 16×16 and 8×8 in the encoder, too, not only in the decoder

# Classes
CLASS_CONDITIONAL: bool = True  # train a class-conditional model, which can be asked for images of a class
CLASS_DROPOUT: float = 0.1  # label-drop probability, for classifier-free guidance and images without a class
GUIDANCE_SCALE: float = 1.0  # scale of classifier-free guidance: 1 = none; 1.5 to 3 = more typical, less varied images

# Diffusion
TIME_STEPS: int = 1000  # timesteps T of the diffusion process
SCHEDULE_TYPE: str = "cosine"  # noise schedule
BETA_START: float = 1e-4  # first beta of the linear schedule, for T = 1000
BETA_END: float = 0.02  # last beta of the linear schedule, for T = 1000
PREDICTION: str = "v"  # what the network predicts: the noise, x_0, or v, which combines both
OBJECTIVE: str = "denoising"  # what is trained; consistency = distil the model of --init_from, for few sampling steps
LOSS_WEIGHT: str = "uniform"  # weight of each timestep in the loss; min_snr weights errors of x_0 by min(SNR, 5)
TIME_SAMPLING: str = "logit_normal"  # timesteps in training; logit_normal favours the middle; distillation: stratified

# Sampling
NUM_SAMPLES: int = 64  # images to generate; in training, in each grid of samples
SAMPLER: str = "dpmpp_2m_sde"  # sampler; consistency by default for a distilled model
STEPS: int = 0  # sampling steps, at most TIME_STEPS; 0 = the sampler's default
ETA: float = 0.0  # noise that DDIM adds per step: 0 = deterministic, 1 = as DDPM
INTERP_STEPS: int = 10  # frames of an interpolation, both ends included
SAMPLE_BATCH: int = 64  # default of --batch_size in sample.py and eval.py
EVAL_SAMPLES: int = 1000  # default of --num_samples in eval.py

# Saving and logging
SAVE_EVERY: int = 5  # epochs between writes of latest.pth
SAVE_MINUTES: float = 10.0  # minutes between writes of latest.pth within an epoch: the most that a crash can cost
SAMPLE_EVERY: int = 10  # epochs between grids of samples; the first and the last epoch have one, too
LOG_EVERY: int = 50  # optimiser steps between logged scalars
DEVICE: str = "auto"  # auto (an accelerator if there is one), cpu, cuda, cuda:1, mps, xpu

# Paths
DATA_PATH: str = "./data/fashion-mnist"  # directory of the data set, downloaded if absent; ./data/<name> for others
CHECKPOINT_PATH: str = "./checkpoints"  # directory of best.pth, latest.pth, final.pth and weights.pth
OUTPUT_PATH: str = "./outputs"  # directory of pictures and scores
LOG_PATH: str = "./logs"  # directory of TensorBoard's files and of scalars.jsonl
