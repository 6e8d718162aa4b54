/**
 * Before and after: the reference and a variant in one place, with a line between them that follows the pointer; or all of them
 * side by side with their differences, as the node's picture shows them.
 *
 * `reference` is what the reference is called, `names` what the variants are; `a_images` are the reference's files, `b_images` those
 * of each variant.
 */

import { html, place, style } from "./dom.js";

export function comparison(element, view, { node, picture, addressOf }) {
  // what was chosen stays chosen over runs
  const state = (node.fluxPokeComparison ??= { variant: 0, image: 0, whole: false });
  state.variant = Math.min(state.variant, view.names.length - 1);
  state.image = Math.min(state.image, view.a_images.length - 1);
  const caption = html("div", { class: "flux-poke-caption" });

  const button = (text, pressed, act) => {
    const made = html("button", { type: "button", "aria-pressed": pressed }, text);
    made.onclick = () => {
      act();
      draw();
    };
    return made;
  };

  function draw() {
    const bar = html("div", { class: "flux-poke-bar" });
    bar.append(button("before | after", !state.whole, () => (state.whole = false)));
    if (picture) bar.append(button("side by side", state.whole, () => (state.whole = true)));
    const step = (key, count, text) => {
      if (count > 1 && !state.whole) bar.append(button(text, false, () => (state[key] = (state[key] + 1) % count)));
    };
    step("image", view.a_images.length, `image ${state.image + 1} of ${view.a_images.length}`);
    step("variant", view.names.length, view.names[state.variant]);

    const stage = html("div", { class: "flux-poke-stage" });
    stage.onpointerdown = (event) => event.button || event.stopPropagation();
    if (state.whole) {
      stage.append(html("img", { src: picture, alt: "side by side" }));
      caption.textContent = "";
    } else {
      const before = html("img", { src: addressOf(view.a_images[state.image]), alt: view.reference, draggable: false });
      const after = html("img", { src: addressOf(view.b_images[state.variant][state.image]), alt: view.names[state.variant], draggable: false });
      const edge = html("hr");
      let share = 50;
      const cut = () => {
        const [high, wide] = [before.naturalHeight, before.naturalWidth];
        edge.style.height = high ? `${Math.min(stage.clientHeight, (stage.clientWidth * high) / wide)}px` : "100%";
        before.style.clipPath = `inset(0 ${100 - share}% 0 0)`;
        edge.style.left = `${share}%`;
      };
      cut();
      stage.onpointermove = (event) => {
        share = Math.max(0, Math.min(100, (100 * place(event, stage)[0]) / stage.clientWidth));
        cut();
      };
      before.onload = cut; // it has a height then
      stage.append(after, before, edge);
      caption.textContent = `left: ${view.reference} · right: ${view.names[state.variant]}: ${view.measures[state.variant]}`;
    }
    element.replaceChildren(bar, stage, caption, style());
  }
  draw();
}
