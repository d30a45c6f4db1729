// Samples over training: a slider that shows one step at a time, and a button that shows all at once. Without script, all are shown.
for (const film of document.querySelectorAll(".film")) {
  const frames = [...film.querySelectorAll("figure")];
  if (frames.length < 2) continue;
  const slider = document.createElement("input");
  Object.assign(slider, { type: "range", min: 0, max: frames.length - 1, value: frames.length - 1 });
  slider.setAttribute("aria-label", "step");
  const button = document.createElement("button");
  button.textContent = "all steps";
  const show = () => {
    frames.forEach((frame, i) => frame.classList.toggle("shown", i === Number(slider.value)));
    slider.setAttribute("aria-valuetext", frames[slider.value].querySelector("figcaption").textContent);
  };
  slider.addEventListener("input", () => { film.classList.add("one"); show(); });
  button.addEventListener("click", () => {
    const one = film.classList.toggle("one");
    button.textContent = one ? "all steps" : "one step";
  });
  slider.addEventListener("input", () => { button.textContent = "all steps"; });
  const controls = document.createElement("div");
  controls.className = "controls";
  controls.append(slider, button);
  film.before(controls);
  film.classList.add("one");
  show();
}
