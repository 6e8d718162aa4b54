/** The graph that made a JPEG, where Flux Poke wrote it down: an ASCII tag "workflow:{...}" in its EXIF, as ComfyUI's WebP have. */

const TEXT = 2;

export async function workflowOf(file) {
  if (file?.type !== "image/jpeg") return null;
  const view = new DataView(await file.slice(0, 1 << 20).arrayBuffer());
  try {
    return workflowIn(view);
  } catch {
    return null; // a picture of somebody else
  }
}

function workflowIn(view) {
  for (let at = 2; view.getUint8(at) === 0xff && view.getUint8(at + 1) !== 0xda; at += 2 + view.getUint16(at + 2)) {
    if (view.getUint16(at) !== 0xffe1 || letters(view, at + 4, 4) !== "Exif") continue;
    const start = at + 10;
    const little = view.getUint16(start) === 0x4949;
    const first = start + view.getUint32(start + 4, little);
    for (let n = 0; n < view.getUint16(first, little); n += 1) {
      const entry = first + 2 + 12 * n;
      if (view.getUint16(entry + 2, little) !== TEXT) continue;
      const text = letters(view, start + view.getUint32(entry + 8, little), view.getUint32(entry + 4, little));
      if (text.startsWith("workflow:")) return JSON.parse(text.slice(9).replace(/\0+$/, ""));
    }
  }
  return null;
}

function letters(view, at, length) {
  return new TextDecoder("latin1").decode(new Uint8Array(view.buffer, at, length));
}
