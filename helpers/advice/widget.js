(function () {
  function setUp(root) {
    const { texts, answers } = JSON.parse(
      root.querySelector('script[type="application/json"]').textContent);
    root.querySelector("table").replaceWith(root.querySelector("template").content);
    const selects = [...root.querySelectorAll("select")];
    const part = (name) => root.querySelector('[data-part="' + name + '"]');
    const button = root.querySelector("button");

    function show() {
      const place = selects.reduce((sum, s) => sum * s.options.length + s.selectedIndex, 0);
      const [bridge, chapter, file, contract, why, code] = answers[place].map((i) => texts[i]);
      for (const [name, text] of Object.entries({ bridge, chapter, contract, code }))
        part(name).textContent = text;
      // Only the built book has a page for each chapter. (Colab's outputs are pages, too.)
      const inBook = /\/(notebooks|book)\/\w+\.html$/.test(location.pathname);
      if (inBook) part("chapter").href = "../notebooks/" + file + ".html";
      part("why").replaceChildren(...why.split("`").map((text, i) => {
        if (i % 2 === 0) return text;
        const made = document.createElement("code");
        made.textContent = text;
        return made;
      }));
      button.textContent = "Copy the code";
    }

    async function copy() {
      try {
        await navigator.clipboard.writeText(part("code").textContent);
      } catch {  // not allowed here: at least mark what is to be copied
        getSelection().selectAllChildren(part("code"));
        if (!document.execCommand("copy")) return;
      }
      button.textContent = "Copied";
    }

    selects.forEach((select) => select.addEventListener("change", show));
    button.addEventListener("click", copy);
    show();  // A browser that goes back to the page restores what was chosen.
  }

  for (const root of document.querySelectorAll(".bridge-chooser:not([data-ready])")) {
    root.dataset.ready = "";
    setUp(root);
  }
})();
