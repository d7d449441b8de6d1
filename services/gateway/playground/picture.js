// A picture as it is sent, shown and cut: what of it each view of the encoder's sees.

const TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif"];

/** A picture of a file or a blob. Throws an Error whose message is for people. */
export async function read(blob, name, maxBytes) {
  if (!TYPES.includes(blob.type)) throw new Error(`${name} is ${blob.type || "of no known type"}: expected a PNG, JPEG, WebP or GIF file.`);
  if (blob.size > maxBytes) throw new Error(`${name} has ${blob.size} bytes, at most ${maxBytes} are taken.`);
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${name} cannot be read.`));
    reader.readAsDataURL(blob);
  });
  const image = new Image();
  image.src = url;
  try {
    await image.decode();
  } catch {
    throw new Error(`${name} is no picture that can be read.`);
  }
  return { url, image, name, width: image.naturalWidth, height: image.naturalHeight };
}

/**
 * The rectangle of the picture, in its pixels, that a view's grid covers; beyond its edges where the view is padded.
 * Without tiles: the centre, cut to the grid's shape. With tiles: the base view is the whole, squeezed; the
 * tiles' valid regions together are the whole.
 */
export function sourceOf(picture, pruned, number) {
  const { width, height } = picture;
  const view = pruned?.views?.[number];
  if (!view) return { x: 0, y: 0, width, height };
  const { grid_height: rows, grid_width: columns } = view;
  if (!pruned.layout) {
    const aspect = columns / rows;
    const cut = width / height > aspect ? { width: height * aspect, height } : { width, height: width / aspect };
    return { x: (width - cut.width) / 2, y: (height - cut.height) / 2, ...cut };
  }
  if (number === 0) return { x: 0, y: 0, width, height };
  const across = pruned.layout.tile_columns;
  const spans = pruned.views.slice(1).map((tile, place) => {
    const valid = tile.valid ?? { top: 0, left: 0, height: rows, width: columns };
    const top = Math.floor(place / across) * rows + valid.top;
    const left = (place % across) * columns + valid.left;
    return { top, left, bottom: top + valid.height, right: left + valid.width, empty: !valid.height || !valid.width };
  }).filter((span) => !span.empty);
  const top = Math.min(...spans.map((span) => span.top));
  const left = Math.min(...spans.map((span) => span.left));
  const down = height / (Math.max(...spans.map((span) => span.bottom)) - top);
  const right = width / (Math.max(...spans.map((span) => span.right)) - left);
  const place = number - 1;
  return {
    x: ((place % across) * columns - left) * right,
    y: (Math.floor(place / across) * rows - top) * down,
    width: columns * right,
    height: rows * down,
  };
}
