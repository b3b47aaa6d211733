"use strict";
// Texts of the model and of the server are only set as textContent: they are never parsed as HTML.

const $ = (id) => document.getElementById(id);
const MAX_IMAGES = Number(document.body.dataset.maxImages);
const MAX_BYTES = Number(document.body.dataset.maxBytes);
let images = []; // {file, url} of each image, in the question's order
let running = null; // the AbortController of the question that is being answered

function showError(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
}

function addImages(files) {
  const pictures = [...files].filter((file) => file.type.startsWith("image/"));
  showError("");
  if (pictures.length < files.length) showError("Files that are not images were left out.");
  if (images.length + pictures.length > MAX_IMAGES) showError(`A question takes ${MAX_IMAGES} images; the others were left out.`);
  for (const file of pictures.slice(0, MAX_IMAGES - images.length)) images.push({ file, url: URL.createObjectURL(file) });
  showImages();
}

function makeElement(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function makeButton(textContent, label, disabled, action) {
  const onclick = () => { action(); showImages(); };
  return makeElement("button", { type: "button", textContent, title: label, ariaLabel: label, disabled, onclick });
}

function showImages() {
  const swap = (i, j) => { [images[i], images[j]] = [images[j], images[i]]; };
  $("images").replaceChildren(...images.map(({ file, url }, i) => {
    const bar = makeElement("div", { className: "bar" },
      makeElement("span", { textContent: `image ${i + 1}` }),
      makeButton("←", `move image ${i + 1} forward`, i === 0, () => swap(i, i - 1)),
      makeButton("→", `move image ${i + 1} back`, i === images.length - 1, () => swap(i, i + 1)),
      makeButton("×", `remove image ${i + 1}`, false, () => { URL.revokeObjectURL(url); images.splice(i, 1); }));
    return makeElement("li", {}, makeElement("img", { src: url, alt: file.name, title: file.name }), bar);
  }));
  const chosen = Number($("target").value);
  $("target").replaceChildren(new Option("the image that the question names", 0), ...images.map((_, i) => new Option(`image ${i + 1}`, i + 1)));
  $("target").value = chosen <= images.length ? chosen : 0;
  const several = images.length > 1;
  $("format").options[1].disabled = several;
  if (several) $("format").value = "think";
}

// Shows one line of the response: the text so far, or the whole answer.
function showLine(line) {
  if ("text" in line) {
    $("text").textContent = line.text;
    return;
  }
  if (line.error) throw new Error(line.error);
  $("status").textContent = line.headline;
  $("status").className = line.box ? "found" : "none";
  const reasoned = line.reasoning !== null;
  $("heading").textContent = reasoned ? "Reasoning" : "Answer";
  $("text").textContent = reasoned ? line.reasoning : line.answer;
  $("whole").hidden = !reasoned;
  $("answer").textContent = line.answer;
  $("picture").src = $("save").href = line.picture;
  $("picture").alt = line.box ? "the images with the box drawn in" : "the images";
  $("figure").hidden = false;
}

async function ask() {
  if (!images.length) return showError("Add an image first.");
  if (!$("question").value.trim()) return showError("Write a question first.");
  if (images.reduce((sum, { file }) => sum + file.size, 0) > MAX_BYTES) {
    return showError(`The images are over ${MAX_BYTES >> 20} MB together. Remove or shrink some.`);
  }
  const form = new FormData($("form"));
  for (const { file } of images) form.append("image", file);

  showError("");
  running = new AbortController();
  $("ask").disabled = true;
  $("stop").hidden = $("result").hidden = false;
  $("figure").hidden = $("whole").hidden = true;
  $("heading").textContent = "Answer";
  $("text").textContent = $("status").className = "";
  $("status").textContent = "Waiting for the model …";
  try {
    const response = await fetch("ask", { method: "POST", body: form, signal: running.signal });
    if (!response.ok) {
      const body = await response.json().catch(() => ({}));
      throw new Error(body.error ?? `The server refused the question (${response.status}).`);
    }
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    let answered = false;
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      const lines = (rest + part.value).split("\n");
      rest = lines.pop();
      for (const line of lines.map((text) => JSON.parse(text))) {
        showLine(line);
        answered = "answer" in line;
      }
    }
    if (!answered) throw new Error("The server stopped before the answer was complete. See its terminal for the cause.");
  } catch (error) {
    if (error.name === "AbortError") {
      $("status").textContent = "Stopped.";
    } else {
      $("result").hidden = true;
      showError(error instanceof TypeError ? "The server does not answer. Is it still running?" : error.message);
    }
  } finally {
    running = null;
    $("ask").disabled = false;
    $("stop").hidden = true;
  }
}

$("files").onchange = () => { addImages($("files").files); $("files").value = ""; };
$("form").onsubmit = (event) => { event.preventDefault(); if (!running) ask(); };
$("stop").onclick = () => running?.abort();
$("question").onkeydown = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
};
document.addEventListener("paste", (event) => { if (event.clipboardData.files.length) addImages(event.clipboardData.files); });
document.addEventListener("dragover", (event) => { event.preventDefault(); $("drop").classList.add("over"); });
document.addEventListener("dragleave", () => $("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  addImages(event.dataTransfer.files);
});
