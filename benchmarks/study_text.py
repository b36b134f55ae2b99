"""What the page of the study says in words: how it is measured, what came out, and what failure looks like.

`tests/test_study.py` holds the findings against the results file.
"""

HEAD = """# The study: which method, when

All methods on the [embedded model](shapes.md), as `make study` runs them. One script writes this page from
`benchmarks/results/study.json`; a run that is not in that file is marked "{not_run}" here.

**{done} of {planned} runs have been run{when}.**

A toy of 3.5 million parameters decides defaults of numerics and speed, and not of taste: the [recipes of the
papers](papers.md) stay as they are.
"""

FINDINGS = """## What it says

- **The reward has a gradient:** VGG-Flow without its value network and DRaFT-3 gain most in the same time (34 and 33
  points), then adjoint matching with two or three steps (26 and 27), with orders 4 and 2+4 of the control's cost as
  with order 2 (28 and 29). They move the velocity a third as far as DRaFT-3, or less, adjoint matching a fifth, and
  keep more diversity where both are equally accurate, in every seed; adjoint matching with three steps the most. The
  value network brings nothing in as many updates and makes them twice as long: with it VGG-Flow gains 9 points.
  Likewise adjoint matching over all twenty steps: 8 points, 2.6 times as long an update for 2 points more in as many.
  The memoryless form gains 1 point in its 34 updates. Rewards are cheap here, and VGG-Flow takes three gradients of
  them where the others take one: at the 624 that all have taken, DRaFT-3 had gained 10 points, adjoint matching 6 and
  VGG-Flow 2.
- **It is a score alone:** AWM gains most in the same time (35 points, with 0.85 of the diversity), then TAFS-GRPO with
  the credit of the last picture (`final`: 29, with all of it) or the default `mixed` (24, with all of it); with that
  of the next step alone (`level`) it gains 15, and collapsed in one of three seeds. Flow-GRPO in four steps gains 7;
  in the ten of its recipe it would need more time. Of the five methods that were compared at as many scored pictures
  AWM, DiffusionNFT and RAM gain most, and pay with diversity: evaluate often, and keep the checkpoint before it falls;
  Flow-GRPO gains 5 points in four steps, and 7 in ten, in three times the time.
- **Twice the demo's rate** won the grid of RAM and DiffusionNFT, and is a gamble: accuracy falls before it rises, and
  in two of three seeds it was ten points below the base when first looked at, after 15 or 16 updates, where a run ends
  by the definition of collapse; the third seed of DiffusionNFT reached 90 %. The demo's rate knows the same fall: in
  the grid both stood 5 and 7 points below the base after 21 and 23 updates. With updates of twice as many pictures
  both were above it at the first look, after 31, and rose to 84 and 89 % in 62.
- **How strong the anchor is** decides more than the rest of AC-Flow does: with signed weights one of 0.5 stays near
  the base for 400 updates and gains 18 points, one of 0.01 gains 47 in 160 with nearly all diversity, and has lost
  more than half of it by 240.
- **For long**, 400 updates of 32 pictures, one seed: Flow-GRPO in ten steps and TAFS-GRPO rose without a collapse, to
  95 and 88 % by the ODE, each with 0.97 of the base's diversity; by their own samplers both to 95 %, with 0.87 and
  0.72 of it. Flow-GRPO took a third of the scored pictures and twice the time. RAM and DiffusionNFT collapsed after
  200 and 240.
- **In few steps:** TAFS-GRPO gained most in the mean: 35 points with `final`, which scores one picture of a
  trajectory and makes more updates, 29 with `mixed`, both with 0.98 of the diversity and no collapse; 27 with `level`,
  with one. AWM gained 24, more than `mixed` in two of three seeds, with a collapse in both; Flow-GRPO, by its own
  sampler, 9.
- **A critic** helps in few steps, where the fixed target is biased, and perhaps with guidance: after as many updates,
  for five times the scores and, in few steps, half as much time again. In the same time it was not compared. What
  AC-Flow's ingredients bring is [judged below](#ac-flows-three-claims).
"""

METHOD = """## How it is measured

- **Two settings.** Differentiable: the reward is the shapes reward, and the checker judges. Black box: the
  reward is the checker, and the shapes reward judges.
- **Seeds** {seeds}. Every table has the mean over them, and the range in brackets. Rows are drawn by the ODE in
  20 steps, on {pictures} pictures of {prompts} held-out prompts, the base model's with the same seeds.
- **The same tuning budget for every method**: its demo's learning rate times {grid}, on seed {grid_seed}, which
  is not among the three, {grid_seconds:.0f} seconds of one core each, in the black box where the method runs there.
  The highest checker accuracy on {grid_pictures} pictures wins, the rate nearest to the demo's of equal ones; the
  tables name it. Twice the rate is the edge of this grid: where it won, a higher one may do better. Of methods that
  hardly move in this time, as AC-Flow, what won is chance. Pictures are drawn by the ODE in 20 steps here too, but for
  the two methods that learn in four and are judged so alone (DiffusionNFT and AWM, 4 steps).
- **The settings.** The equations are those of the method's page, sizes and optimizer the demo's: {images} pictures
  an update where a method takes no gradient of the reward, LoRAs of rank 16, no moving average; fewer pictures of a
  prompt and fewer levels than the recipes of RAM and AWM have. AC-Flow has signed weights (`linear`), an anchor of 0.5
  and, but for one table, the critic that scores clean estimates. Rollouts take 20 steps for a gradient of the reward,
  8 of DiffusionNFT and AC-Flow's trainer, 4 of TAFS-GRPO; of Flow-GRPO 10, as its recipe has them, or 4.
- **Equal budgets.** Runs train for {seconds:.0f} seconds of one core, evaluations not counted. At equal time, reward
  calls (scored pictures) or updates means: at the most that every run of the table has spent that did not collapse,
  on straight lines between evaluations. A clean estimate that is scored, or through which a gradient is taken, counts
  as a picture.
- **Diversity** is the mean distance between right pictures of a prompt; **velocity distance** is relative to
  the base velocity; **feature distance** is between tuned and base picture of the same prompt and seed, in the
  space of the shapes reward, at the end of the run.
- **Over-optimisation** is the training reward since the evaluation before, less the held-out checker accuracy,
  in points. It compares runs of one method: rollouts differ in their samplers, and `shapes` is no percentage.
- **At matched checker accuracy**: the highest that both runs of a seed reached, where each first reached it; the
  difference is in shares of the base model's diversity.
- **Collapse** was defined before the long runs: the first evaluation at which diversity is below {kept:g} of
  the base model's, or checker accuracy is {lost:g} points below its best in the run so far, the base included. A run
  ends there, and counts with its last evaluation among runs that went on.
"""


CLAIMS = """### AC-Flow's three claims

One seed of each run; the accuracy of 256 pictures has a standard error of 3 points. Exponential weights of mean 1
teach a model its own pictures too, flaws included: row by row they gained half as much as signed ones, or less.

- **Shaping of the reward:** confirmed. Raw rewards, all of which push towards a picture, gained less than half as
  much as rewards that are centred and scaled; both without a critic, as the default one does not take raw ones.
- **Clipping with a warm-up:** not confirmed. Advantages clipped at one standard deviation cost eleven points at the
  end with signed weights and seven with exponential ones, and nothing became unstable without: no collapse, as much
  diversity, a velocity that stays near the base's. What keeps these runs stable is the anchor. With a fiftieth of it
  signed weights collapsed although they were clipped, and exponential ones without it drew three right pictures in a
  hundred after 40 updates. The warm-up of the network critic makes no difference with either weighting: it sees
  next to nothing in its first 50 updates (3 % near the data at most), with it or without.
- **Weights from the critic:** not confirmed. Without a critic a run ended as high, within the error, with either
  weighting, from a fifth of the scores and in two thirds of the time. At no level where anything could be explained
  does a critic explain 80 % of it: the default one judges by the clean estimate of one step, and a network learns
  through all 400 updates to explain between a fifth and a quarter near the data.
"""


FAILURES = """## What failure looks like

- **AWM, DiffusionNFT, RAM, and AC-Flow with a weak anchor:** accuracy goes on rising while diversity falls: circles
  get corners, the pictures of a prompt grow alike, and the velocity becomes longer than the base's (of AC-Flow it
  becomes shorter, near the data). `diversity` in evaluations and `velocity_norm_ratio_N` show it; the reward does not.
  RAM with updates of 32 pictures falls back in accuracy as well, from 69 to 47 %.
- **AC-Flow with exponential weights and no anchor:** the model is taught its own flaws: after 40 updates nearly all
  objects have other colours or shapes than were asked for.
- **RAM and DiffusionNFT at twice the demo's rate:** accuracy falls before it rises: colours run into one another, and
  crosses stand where triangles were asked for.
- **ORW-CFM-W2:** pictures weighted by their reward, flaws included, with an anchor of 0.3: the velocity moves further
  than with any other method in this time, and accuracy falls slowly, ten points in 52 updates.
- **The same in four steps:** the mean of the pictures that such a sampler draws is not its velocity, so a model that
  is taught its own pictures changes before it has learned anything. Accuracy falls first, and where it rises again,
  diversity is lost. RAM without a critic draws yellow flecks beside the objects.
- **TAFS-GRPO:** for a third of the time next to nothing by the ODE, from 7 points below the base to 6 above; then it
  rises.
- **Flow-GRPO in ten steps:** in 240 seconds next to nothing is learned, while the velocity moves twice as far as
  adjoint matching's; the rise comes after 100 updates.
- **DRaFT-3:** none in this time but the way that it goes: a velocity far from the base's, which is what the control's
  cost holds back in adjoint matching.
- **Adjoint matching:** now and then an object that is neither what the base drew nor what was asked for, as the blue
  triangle of the grid: the last three steps alone are tuned, and they cannot begin anew.
- **VGG-Flow with its value network, AC-Flow with signed weights, memoryless adjoint matching:** nothing breaks, and
  little happens in the time of a run: AC-Flow, whose critic scores five times as many pictures, gains 1 to 3 points.
"""


PUBLISHED = """## With published weights

`python benchmarks/published.py` tunes a published model for a task that others report, and puts it beside their
numbers, the guidance regime stated.

--8<-- "docs/tables/published.md"
"""


SCORED_TEXT = """Five methods for rewards without a gradient (TAFS-GRPO and ORW-CFM-W2 were not run so), at the
learning rate of the demos, not tuned on a grid. 128 pictures an update; Flow-GRPO, too, is judged by the ODE in 20
steps. AC-Flow stands here with the convolutional critic, as the one that scores clean estimates would score five times
as many pictures."""
CRITICS_TEXT = """A critic frees the fixed target of bias wherever the velocity of the old policy is not the mean of
its own pictures' ([why](ac_flow.md)): where rollouts are guided and the loss is not, and in few steps. RAM with and
without the critic that scores clean estimates, as many updates as above of half as many pictures; they are judged with
the guidance and the steps of the rollouts. The critic spends four more reward calls for each picture."""
