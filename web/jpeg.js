/** The graph that made a JPEG, as Flux Poke writes it: ASCII tags "workflow:{...}" and "prompt:{...}" in its EXIF. */

const TEXT = 2;

/** {workflow}, or else {prompt}, or neither of them. */
export async function graphOf(file) {
  if (file?.type !== "image/jpeg") return {};
  const view = new DataView(await file.slice(0, 1 << 20).arrayBuffer());
  try {
    const { workflow, prompt } = textsIn(view);
    if (workflow) return { workflow: JSON.parse(workflow) };
    // a prompt may hold NaN, which Python writes and JSON does not know
    return prompt ? { prompt: JSON.parse(prompt.replace(/([[,:]\s*)(NaN|-?Infinity)(?=\s*[\],}])/g, "$1null")) } : {};
  } catch {
    return {}; // a picture of somebody else
  }
}

function textsIn(view) {
  const found = {};
  for (let at = 2; view.getUint8(at) === 0xff && view.getUint8(at + 1) !== 0xda; at += 2 + view.getUint16(at + 2)) {
    if (view.getUint16(at) !== 0xffe1 || letters(view, at + 4, 4) !== "Exif") continue;
    const start = at + 10;
    const little = view.getUint16(start) === 0x4949;
    const first = start + view.getUint32(start + 4, little);
    for (let n = 0; n < view.getUint16(first, little); n += 1) {
      const entry = first + 2 + 12 * n;
      const length = view.getUint32(entry + 4, little);
      if (view.getUint16(entry + 2, little) !== TEXT || length < 12) continue;
      const text = letters(view, start + view.getUint32(entry + 8, little), length);
      const [, key, json] = text.match(/^(workflow|prompt):([^\0]*)/) ?? [];
      if (key) found[key] = json;
    }
  }
  return found;
}

function letters(view, at, length) {
  return new TextDecoder("latin1").decode(new Uint8Array(view.buffer, at, length));
}
