// Masks as COCO's compressed run lengths: read, and painted.

/** The counts of a compressed string: runs of 0 and 1 in turn, down the columns. */
export function expand(text) {
  const counts = [];
  for (let i = 0; i < text.length;) {
    let value = 0, shift = 0, code;
    do {
      code = text.charCodeAt(i++) - 48;
      value |= (code & 31) << shift;
      shift += 5;
    } while (code & 32);
    if (code & 16 && shift < 32) value |= -1 << shift;
    counts.push(counts.length > 2 ? value + counts[counts.length - 2] : value);
  }
  return counts;
}

/** Lay a mask {size: [height, width], counts} over `image` (ImageData of that size) in a colour [r, g, b]; its border is solid. */
export function paint(image, { size: [high, wide], counts }, [r, g, b], share) {
  const inside = new Uint8Array(high * wide);
  let at = 0;
  expand(counts).forEach((count, i) => {
    if (i % 2) inside.fill(1, at, at + count);
    at += count;
  });
  const { data } = image;
  for (let x = 0; x < wide; x++) {
    for (let y = 0; y < high; y++) {
      const i = x * high + y;
      if (!inside[i]) continue;
      const edge = !x || !y || x === wide - 1 || y === high - 1 || !inside[i - 1] || !inside[i + 1] || !inside[i - high] || !inside[i + high];
      const part = edge ? 1 : share, p = 4 * (y * wide + x);
      data[p] += (r - data[p]) * part;
      data[p + 1] += (g - data[p + 1]) * part;
      data[p + 2] += (b - data[p + 2]) * part;
      data[p + 3] = 255;
    }
  }
}
