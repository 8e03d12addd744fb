/* The list of chapters opens at the reader's place, wherever it stood a page before. */
addEventListener("load", () => {
  const links = document.querySelectorAll(".bd-sidebar-primary .current.active > a");
  [...links].pop()?.scrollIntoView({ block: "nearest" });
});
