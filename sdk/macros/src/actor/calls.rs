//! The callers' side of an actor: a trait with a call for each of its methods, implemented by references
//! to it.

use proc_macro2::{Ident, TokenStream};
use quote::{format_ident, quote};
use syn::Type;

use crate::method::{Method, Output};

/// The trait with an actor's calls, on references to it.
pub(super) fn write_calls(type_ident: &Ident, actor: &Type, calls: &[&Method]) -> TokenStream {
    let trait_ident = format_ident!("{type_ident}Calls", span = type_ident.span());
    let trait_docs = format!("The calls of [`{type_ident}`], on an `ActorRef` to it.");
    let signatures: Vec<TokenStream> = calls.iter().map(|method| write_signature(method)).collect();
    let declarations = calls.iter().zip(&signatures).map(|(method, signature)| {
        let docs = &method.docs;
        let fallback = docs.is_empty().then(|| {
            let text = format!("Calls `{type_ident}::{}`.", method.name);
            quote!(#[doc = #text])
        });
        quote!(#(#docs)* #fallback #signature;)
    });
    let definitions = calls.iter().zip(&signatures).map(|(method, signature)| {
        let text = method.name.to_string();
        let names = method.arguments.iter().map(|(name, _)| name);
        let make = match method.output {
            Output::Value(_) => quote!(call),
            Output::Fallible(..) => quote!(fallible_call),
            Output::Items(_) => quote!(stream_call),
        };
        quote!(#signature { ::mobula::__private::#make(self, #text, &(#(#names,)*)) })
    });
    quote! {
        #[doc = #trait_docs]
        #[allow(
            dead_code, unreachable_pub, private_interfaces, private_bounds,
            clippy::too_many_arguments, clippy::wrong_self_convention
        )]
        pub trait #trait_ident {
            #(#declarations)*
        }

        #[allow(clippy::too_many_arguments)]
        impl #trait_ident for ::mobula::ActorRef<#actor> {
            #(#definitions)*
        }
    }
}

fn write_signature(method: &Method) -> TokenStream {
    let name = &method.name;
    let names = method.arguments.iter().map(|(name, _)| name);
    let types = method.arguments.iter().map(|(_, argument)| argument);
    let returned = match &method.output {
        Output::Value(value) => quote!(::mobula::Call<#value>),
        Output::Fallible(value, error) => quote!(::mobula::FallibleCall<#value, #error>),
        Output::Items(item) => quote!(::mobula::StreamCall<#item>),
    };
    quote!(fn #name(&self, #(#names: #types),*) -> #returned)
}
