// The kinds of kept tokens: each has a colour, a mark and words, so that none is told by colour alone.
// The colours are Okabe and Ito's, as in the pictures that `hiprune ask --overlay` draws.

export const KINDS = {
  anchor: { colour: "#D55E00", says: "most attended in the object layer", mark: "M8 2a6 6 0 1 0 0 12a6 6 0 1 0 0-12z" },
  buffer: { colour: "#E69F00", says: "beside an anchor", mark: "M8 2a6 6 0 1 0 0 12a6 6 0 1 0 0-12zM8 5.4a2.6 2.6 0 1 1 0 5.2a2.6 2.6 0 1 1 0-5.2z" },
  register: { colour: "#0072B2", says: "most attended in the deep layer", mark: "M3 3h10v10H3z" },
  text: { colour: "#CC79A7", says: "most like the question", mark: "M8 2l6.5 11.5h-13z" },
  control: { colour: "#009E73", says: "kept without a look at the scores", mark: "M8 1l7 7l-7 7l-7-7z" },
  dominant: { colour: "#56B4E9", says: "most attended by CLS", mark: "M5 2h6l4 6l-4 6h-6l-4-6z" },
  diverse: { colour: "#F0E442", says: "unlike the others kept", mark: "M6 2h4v4h4v4h-4v4h-4v-4h-4v-4h4z" },
};

const OTHER = { colour: "#999999", says: "of a service newer than this page", mark: "M3 3h10v10H3zM6 6h4v4H6z" };

/** What there is to say of a kind, known here or not. */
export const kindOf = (kind) => KINDS[kind] ?? OTHER;

/** The kinds in their order, and after them a view's that are not known here. */
export const kindsOf = (view) => [...new Set([...Object.keys(KINDS), ...(view?.kinds ?? [])])];

export const METHODS = {
  hiprune: "Anchors and their neighbours by the object layer, registers by the deep layer.",
  "hiprune++": "As hiprune, and a share of the budget for what the question asks about.",
  visionzip: "A peer: the tokens that CLS attends to most, in the deep layer.",
  divprune: "A peer: the tokens that are least alike.",
  random: "A control: any tokens, the same for the same picture.",
  strided: "A control: evenly spaced tokens.",
  none: "Every token is kept.",
};

/** The layers of scores, in their order, and what each tells. */
export const SCORES = {
  object: { title: "Object layer", says: "attention that finds objects" },
  deep: { title: "Deep layer", says: "attention that sums up the scene" },
  cls: { title: "CLS", says: "attention from CLS" },
  similarity: { title: "Question", says: "likeness to the question" },
};

const paths = new Map();

/** A kind's mark as a path of 16 by 16. */
export function markOf(kind) {
  if (!paths.has(kind)) paths.set(kind, new Path2D(kindOf(kind).mark));
  return paths.get(kind);
}

// cividis: rises evenly in lightness, for every kind of colour vision
const RAMP = [[0, 34, 78], [18, 53, 112], [59, 73, 108], [87, 93, 109], [112, 113, 115], [138, 134, 120], [165, 156, 116], [195, 179, 105], [225, 204, 85], [254, 232, 56]];

/** The colour of a share in [0, 1]. */
export function heat(share) {
  const at = Math.max(0, Math.min(1, share)) * (RAMP.length - 1);
  const low = Math.min(Math.floor(at), RAMP.length - 2);
  const mixed = RAMP[low].map((from, i) => Math.round(from + (RAMP[low + 1][i] - from) * (at - low)));
  return `rgb(${mixed.join(" ")})`;
}
