/* Looking at images: sliders that keys move and screen readers can follow, and figures that open at full size. */

const STEPS = { ArrowLeft: -5, ArrowDown: -5, ArrowRight: 5, ArrowUp: 5, PageDown: -25, PageUp: 25, Home: -100, End: 100 };

/* The WAI-ARIA slider pattern, which img-comparison-slider lacks; its own keys move only while held (keyboard="disabled"). */
function describe(slider) {
  const images = [...slider.querySelectorAll("img")];
  const tell = () => {
    const left = Math.round(slider.value);
    slider.setAttribute("aria-valuenow", left);
    slider.setAttribute("aria-valuetext", `${left} % of ${images[0].alt}`);
  };
  slider.setAttribute("role", "slider");
  slider.setAttribute("aria-valuemin", 0);
  slider.setAttribute("aria-valuemax", 100);
  slider.setAttribute("aria-label", images.map((image) => image.alt).join(" | "));
  slider.addEventListener("slide", tell);
  slider.addEventListener("keydown", (event) => {
    if (!(event.key in STEPS) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault(); // the page stays where it is
    slider.value += STEPS[event.key];
    tell();
  });
  tell();
}

/* One dialog for all figures: Escape, the button or a click anywhere in it closes it. */
function zoom(images) {
  const dialog = document.createElement("dialog");
  const close = document.createElement("button");
  const large = document.createElement("img");
  dialog.className = "zoom";
  large.className = "dark-light";
  close.textContent = "\u00d7";
  close.setAttribute("aria-label", "Close");
  dialog.append(close);
  document.body.append(dialog);
  dialog.addEventListener("click", () => dialog.close());
  for (const image of images) {
    const open = () => {
      large.src = image.currentSrc;
      large.alt = image.alt;
      dialog.append(large); // only now: an image without a source is none
      dialog.setAttribute("aria-label", image.alt);
      dialog.showModal();
    };
    image.classList.add("zoomable");
    image.tabIndex = 0;
    image.setAttribute("role", "button");
    image.setAttribute("aria-haspopup", "dialog");
    image.addEventListener("click", open);
    image.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      open();
    });
  }
}

document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll("img-comparison-slider").forEach(describe);
  const figures = document.querySelectorAll(".bd-article img:not(a img, img-comparison-slider img)");
  if (figures.length) zoom(figures);
});
