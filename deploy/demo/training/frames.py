"""Sentence frames for requests and descriptions. The last fifth of every list is for evaluation
(`Source.frame`), so each list is mixed: no kind of frame occurs only at its end. A held-out
parameter frame resembles frames of training and has no word that they lack. Evaluation shows new
sentences, not new words of frames."""


def _frames(text: str) -> tuple[str, ...]:
    return tuple(frame for line in text.splitlines() for frame in line.split("|"))


# Before a verb in its base form.
OPENERS = _frames("""\
please|can you|could you|I want you to|could you please|I need to|we have to|help me|now
I would like to|you should|let us|hey,|we need to|I'd like you to|can you please|I want to
go ahead and|be so good and|you need to|try to|your job is to|make sure to|do not forget to
remember to|hi, please|hello, can you|I have to|next,|first,|the plan is to|my team wants you to
is it possible to|do you think you could|I was told to|we want to|they told us to
the user wants to|for this one,|if you can,|quickly|just|simply|so|okay,|well,
I am going to need you to|what I want is to|all I need is to|you can|feel free to
it would help to|the best thing is to|it is important to|someone has to|we are here to|today we
I think you should|I hope you can|I decided to|she asked you to|he wants you to|the idea is to
there is a need to|my plan is to|I will need you to|I ask you to|we ask that you|help us
be quick and|would you mind if I asked you to|would you|it is time to|my boss wants to|kindly
we must|they asked me to|I would love to|can somebody|may I ask you to|our task is to|I must
how about you|the customer asked us to|I wish to|will you
""")
ARTICLES = (" the", " the", " the", " the", " a", " my", "", " this", " that", " our", " one")
CLOSERS = _frames("""\
 for me| please| right now| today| for us| as soon as you can| if possible| now| again
 once more| at once| for my boss| if you can| one more time| soon| when you are ready
 before we go on| this time| for a friend| without asking| for the team| right away
 if you would| for my family| very soon
""")
# Join an intent and its arguments. Frames that begin with the arguments are in a list of their own.
REQUESTS = _frames("""\
{intent} with {params}.|{intent}, {params}.|{intent}. {Params}.|{intent} ({params}).
{intent}: {params}|{intent} using {params}.|{intent} where {params}.|{intent}; {params}.
{intent}? {Params}.|{intent}, and {params}|{intent} - {params}|{intent} and use {params}.
{intent}, with {params}|{intent} so that {params}.|{intent}, but {params}.
{intent} by using {params}.|{intent}. Use {params}.|{intent}. Here: {params}.
{intent}: use {params}.|{intent}! {Params}.|{intent} like this: {params}.
{intent}, as follows: {params}.|{intent} with these: {params}|{intent}. The details: {params}.
{intent} [{params}]|{intent}, this way: {params}|{intent} on these terms: {params}.
{intent} and make sure that {params}.|{intent}, I mean with {params}.|{intent}, where {params}.
{intent} and note that {params}.|{intent}. I want {params}.|{intent}. It should have {params}.
{intent} having {params}.|{intent} under {params}.|{intent} such that {params}.
{intent} / {params}|{intent} -- {params}.|{intent}. Note: {params}.|{intent}. Take {params}.
{intent} given {params}.|{intent}, please: {params}.|{intent}, using {params}.
{intent}, namely {params}.|{intent} based on {params}.|{intent} when {params}.
{intent}. Please take {params}.|{intent}, please use {params}.|{intent}: {params}, thanks.
{intent}; {params}, please.|{intent} and take {params}.|{intent}. It has {params}.
{intent}: with {params}.|{intent}. Given: {params}.|{intent}, namely with {params}.
{intent}. My choice: {params}.|{intent}. My wish: {params}.|{intent}. I choose: {params}.
{intent}, given {params}.|{intent}. Please use {params}.|{intent}, with these: {params}.
{intent} - use {params}.|{intent}. Please note: {params}.|{intent}. Thanks, with {params}.
{intent}, based on {params}.|{intent}: here {params}.|{intent}; use {params}.
{intent}; with {params}.|{intent}, please, with {params}.|{intent}. With {params}.
""")
PARAMETERS_FIRST = _frames("""\
with {params}, {intent}.|for {params}: {intent}.|{params}: {intent}.|{params}. {intent}.
using {params}, {intent}.|if {params}, {intent}.|{params}; {intent}.
given that {params}, {intent}.|take {params} and {intent}.|when {params}, {intent}.
since {params}, {intent}.|based on {params}: {intent}.|given {params}; {intent}.
I have {params}. {intent}.|use {params}: {intent}.|with {params}: {intent}.
here is {params}: {intent}.|use {params} and {intent}.|given {params}, {intent}.
based on {params}, {intent}.|I have {params}: {intent}.
""")
# {p} is a parameter's name, {v} its value.
PARAMETERS = _frames("""\
{p} {v}|{v} as {p}|{p}: {v}|{v} for {p}|{p} is {v}|{v} is {p}|{p} = {v}|use {v} for {p}
{p} set to {v}|{v} as value of {p}|{p} of {v}|put {v} as {p}|{p} should be {v}
choose {v} for {p}|set {p} to {v}|{v} in {p}|let {v} be {p}|{p} needs to be {v}
{p} -> {v}|give {v} to {p}|I want {v} as {p}|{p}={v}|{p} has to be {v}|{v} ({p})
{p} ought to be {v}|{p} will be {v}|{p} being {v}|{v} will be {p}|with {p} {v}|{p} here is {v}
{v} should be {p}|{v} goes into {p}|{p} => {v}|{p} would be {v}|let {p} be {v}|{p} can be {v}
{v} to be {p}|fill {p} with {v}|for {p} use {v}|for {p} take {v}|for {p} I want {v}
as {p} use {v}|as {p} I choose {v}|{p} - {v}|{p} ({v})|{p} [{v}]|{p} which is {v}
{p} namely {v}|{p} at {v}|{p} named {v}|{p} called {v}|{p} to {v}|{p} by {v}|{p} like {v}
{v} on {p}|{v} at {p}|{v} is what {p} is|I need {v} for {p}|I need {p} {v}|I have {v} for {p}
we want {p} to be {v}|we need {v} as {p}|{p} I want is {v}|{p} we need is {v}|use {p} {v}
use {v} as {p}|use {v} in {p}|use {p}: {v}|have {p} as {v}|have {v} as {p}|keep {p} at {v}
keep {v} as {p}|let us say {p} is {v}|say {v} for {p}|{p} may be {v}|{p} was {v}|{v} was {p}
{v} being {p}|{v} of {p}|{p} with {v}|want {p} to be {v}|put {p} at {v}
in {p} put {v}|{p} wants {v}|it has {p} {v}|{p} stays {v}|{p} only {v}|only {v} for {p}
{p} exactly {v}|{p} now {v}|{p} just {v}|{p} from now on {v}|{p} := {v}|{v} => {p}
{v} -> {p}|{v} = {p}|{v}: {p}|{v} - {p}|enter {v} for {p}|enter {v} in {p}|write {v} into {p}
{p} becomes {v}|{v} becomes {p}|call {p} {v}|{p} looks like {v}|{p} reads {v}|I think {p} is {v}
I like {v} for {p}|I choose {v} as {p}|go with {v} for {p}|go for {p} {v}|where {p} is {v}
that has {p} {v}|having {p} {v}|having {v} as {p}|{v} would be {p}|{v} might be {p}
{v} can be {p}|{v} serves as {p}|{v} stands for {p}|{p} stands at {v}|{p} has {v}
{p} takes {v}|its value for {p} is {v}|my choice for {p} is {v}|{p} == {v}|{p} holds {v}
my choice as {p} is {v}|our choice is {v} as {p}|the choice is {v} for {p}|my choice: {v} for {p}
my pick is {v} for {p}|my pick: {v} as {p}|our pick is {v} as {p}|I choose {v} for {p}
we choose {v} for {p}|I pick {v} for {p}|pick {v} as {p}|we pick {v} as {p}|I take {v} for {p}
I take {v} as {p}|we take {v} for {p}|take {v} for {p}|take {v} in {p}|take {p} as {v}
take {p}: {v}|I assign {v} to {p}|we assign {v} to {p}|assign {v} for {p}|assign {v} as {p}
assign {p} to {v}|assign {p} {v}|{v} assigned to {p}|{p} gets the value {v}|{p} will get {v}
my wish is {v} as {p}|{p} must then be {v}|{p} must have {v}|{p} must equal {v}
{v} must stand for {p}|{v} must go to {p}
{p} shall have {v}|{p} shall then be {v}|{v} shall stand for {p}|{v} shall go to {p}
{p} is equal to {v}|{p} equals to {v}|{p} that equals {v}|{p} with the value {v}
the value of {p} is {v}|the value {v} for {p}|value {v} as {p}|{v} has the value of {p}
I would like {v} as {p}|I'd like {v} for {p}|I'd like {p} to be {v}|we'd like {v} as {p}
we have {v} for {p}|I have {v} as {p}|with {v} for {p}|with {v} in {p}|try {v} as {p}
try {p} {v}|{p} could then be {v}|{v} could be {p}|{v} needs to be {p}|{p} simply {v}
{p} that was {v}|{p} then {v}|insert {v} for {p}|insert {p} {v}|insert {v} into {p}
on {p} put {v}|for {p}: {v}|as {p}: {v}|{p}: take {v}|{p}: put {v}|{p} hereby is {v}
{p} gets {v}|{v} must be {p}|{p} equals {v}|{p} might be {v}|{p} needs {v}|my wish for {p} is {v}
my choice is {v} for {p}|our choice for {p} is {v}|my pick for {p} is {v}|{p} then is {v}
{p} equal to {v}|{p} must be {v}|take {v} as {p}|pick {v} for {p}|{v} shall be {p}
{p} shall be {v}|I'd like {v} as {p}|we have {v} as {p}|{p} could be {v}|assign {v} to {p}
{v} has to be {p}|{p} simply is {v}|{p} that is {v}|with {v} as {p}|{p} as {v}
insert {v} as {p}|try {v} for {p}|on {p} use {v}|{p}: use {v}|{p} takes the value {v}
we choose {v} as {p}|I pick {v} as {p}|the value for {p} is {v}|{p} holds the value {v}
I need {v} as {p}|we need {v} for {p}|we want {v} as {p}|{v} ought to be {p}|{v} may be {p}
set {v} for {p}|put {v} for {p}|put {v} in {p}|keep {v} for {p}|choose {v} as {p}|have {v} for {p}
give {p} {v}|enter {v} as {p}|write {v} for {p}|{p} having {v}|let {p} equal {v}
""")
# Parameter frames that begin with these words are sentences: they cannot follow "with".
SENTENCES = frozenset(
    """use put choose set let give fill have keep say want enter write call go take pick assign try
    insert I I'd we we'd my our it its with on in for as where having that only""".split()
)
# The beginning of a tool's description up to its object, and what may follow it.
DESCRIPTIONS = _frames("""\
{Verbs}|{Verb}|Use this to {verb}|Tool that {verbs}|This function {verbs}|Call it to {verb}
Can {verb}|A tool that {verbs}|A function that {verbs}|Helps you to {verb}|Used to {verb}
Use it to {verb}|Use it when the user wants to {verb}|When called, {verbs}|This will {verb}
It {verbs}|This tool {verbs}|Function to {verb}|Tool to {verb}|For users who want to {verb}
Allows the user to {verb}|Able to {verb}|Simply {verbs}|Call this to {verb}|Quickly {verbs}
You can {verb}|Use when you need to {verb}|Here to {verb}|Will {verb}|Safely {verbs}
Always {verbs}|Service that {verbs}|API to {verb}|Only {verbs}|An action that {verbs}
Helper to {verb}|If the user asks to {verb}|What it does: {verbs}|This one {verbs}
With this you {verb}|Lets you {verb}|To {verb}|Made to {verb}|Tries to {verb}|Helps to {verb}
Method that {verbs}|Call this when someone wants to {verb}|This API {verbs}|This lets you {verb}
Please use this to {verb}
""")
DESCRIPTION_ARTICLES = (" the", " the", " the", " a", " a", "", " one", " any", " some")
DESCRIPTION_ENDS = _frames("""\
.| for the user.| and returns the result.| of the account.| and says how it went.
 in the system.| when asked.| for you| (fast).| at once.| by its parameters.
 and tells what happened.| if it is there.| with the given values.| on request.
 and gives back what it found.| for someone.|; returns JSON.| as told.| that the user means.
 in one step.| and nothing else.| of the user.| and returns it.| as asked.| right away.
 with what is given.
""")
JOINERS = (
    " Then ", " Also ", " And ", "\n", "\nAfter that ", " ", " And then ", " After that, ",
    " Next, ", "\nThen ", "\nAlso, ", " Besides, ", " Finally, ", " Second, ", "\n\n", "\n- ",
)  # fmt: skip
