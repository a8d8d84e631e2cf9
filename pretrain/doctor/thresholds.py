"""Where a number stops being normal, and why there.

A false alarm costs more than a late one: who has met one stops reading. So each of these leaves alone every
run that ends well, short ones and the first minutes of long ones above all.
"""

from __future__ import annotations

# what "recently" is: this share of a start's log lines, at least and at most so many
RECENT_RATIO = 0.1
MIN_RECENT, MAX_RECENT = 5, 50

# nothing is said about speed from less: the first batches, a cold disk cache and compiling are still in it
MIN_TIMED_STEPS = 20
MIN_TIMED_SECONDS = 3.0

# waiting for data: 5 % is the aim for a run on GPUs; a fifth is worth an hour of somebody's time
MAX_DATA_WAIT_RATIO = 0.2
# where the training process decodes and cuts by itself, that time is work, of which a small model has much
MAX_DATA_WORK_RATIO = 0.5
# a storage that is asked again once in a hundred steps costs nothing; more often it is failing
MAX_RETRIES_PER_STEP = 0.01
# of the budget of bad samples: with half of it used up, the run is likely to end before its last epoch
MAX_BUDGET_RATIO = 0.5

# a step that became twice as long may be due to others on the same machine; four times as long is looked into
NOTED_SLOWING, MAX_SLOWING = 2.0, 4.0
MIN_SLOWING_SECONDS = 60.0  # of training
# host memory that grew by half, and by more than caches and allocators do in a long run
MAX_MEMORY_GROWTH = 1.5
MIN_MEMORY_GROWTH_BYTES = 1 << 30
MIN_MEMORY_RECORDS = 20

# a live run writes a log line at its pace; after so many times that, it stands still
MAX_PAUSE = 10.0
MIN_PAUSE_SECONDS = 120.0
# an attempt raises its counter every 10 s
BEAT_SECONDS = 60.0
# time in steps over all time; below, restarts and waiting cost more than they should
MIN_GOODPUT_RATIO = 0.7
MIN_GOODPUT_SECONDS = 3600.0

# steps that are skipped now and then are the loss scale of luck; one in a hundred is not
MAX_SKIPPED_RATIO = 0.01
MIN_SKIPPED = 3
MAX_SPIKES_RATIO = 0.01
MIN_SPIKES = 5
# a loss that is no teacher's: so far above where it began that it has not merely failed to fall
MAX_LOSS_GROWTH = 1.3
MIN_LOSS_STEPS = 20

# learning is judged late: a jigsaw of 36 places needs some hundred steps before it leaves chance
MIN_TASK_STEPS = 400
MIN_TASK_RATIO = 0.5  # of the run
SOLVED_STDS = 3.0  # an accuracy so many standard deviations above chance is above it
SOLVED_RATIO = 1.1  # and it counts as above from this times chance on
FLAT_LOSS_RATIO = 0.98  # of the loss at the beginning
MIN_WEIGHT_RATIO = 0.01  # of the weight that a task began with, under a balance that learns it
MIN_GRADIENT_COSINE = -0.3  # two tasks pull against each other in most steps
MIN_COSINE_RECORDS = 5

# representations
MAX_STD_FALL = 0.1  # of the widest that the features ever were, and
LOW_FEATURE_STD = 0.05  # so near to a point
MIN_EFFECTIVE_RANK = 1.5  # one direction holds nearly everything
MIN_SIMILARITY_GAP = 0.01  # between two views of an image and two images
HIGH_SIMILARITY = 0.95  # of different images
MIN_FEATURE_STEPS = 100
# a teacher begins near the uniform distribution and leaves it slowly, so its entropy is judged late
MIN_TEACHER_STEPS = 1000
ENTROPY_LOW, ENTROPY_HIGH = 0.01, 0.99  # of ln K
ONE_PROTOTYPE_RATIO = 0.95  # of different images that share their best prototype

# checkpoints
LATE_CHECKPOINT = 2.0  # intervals without a new one
MAX_LOSS_SECONDS = 2 * 3600.0  # of work between two checkpoints, which a kill costs
HASHED_BYTES = 1 << 30  # of the newest checkpoint: about a second; larger ones are hashed when asked
